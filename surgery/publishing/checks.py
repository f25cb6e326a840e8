"""Checks of an adapter folder before it is published, reading it piece by piece: memory is that of a layer."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import contents_of
from surgery.adapters.foreign_formats import foreign_format
from surgery.adapters.inner_folders import inner_adapter
from surgery.adapters.lacking import lacking_in
from surgery.adapters.names import CARD_FILE, CONFIG_FILE, MODEL_PREFIX, TUNER_PREFIX, WEIGHTS_FILE
from surgery.adapters.packing import is_packed
from surgery.adapters.regex_check import check_patterns
from surgery.adapters.types.registry import ADAPTER_TYPES, type_of
from surgery.deltas.spectrum import effective_rank, has_cheap_spectrum, singular_values
from surgery.errors import AdapterError, CheckpointError, HubError, listing
from surgery.methods.registry import method_for_type
from surgery.storage.hub_cache import is_legacy_id
from surgery.storage.safetensors_read import read_tensor
from surgery.storage.safetensors_write import DTYPE_OF_CODE, Tensor, read_header, stored_pieces
from surgery.system.memory import release_freed

__all__ = ["BASE_ID", "REPO_ID", "Checked", "Measured", "base_model_id", "check_adapter", "valid_id"]

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
BASE_ID = re.compile(rf"(?P<repo>{REPO_ID.pattern}|[a-z0-9-]+)(?:@(?P<revision>[\w./-]+))?")
# A layer of more bytes is not decomposed for the picture.
MOST_BYTES = 1 << 26
HEADS = {"classifier", "score"}


@dataclass(frozen=True)
class Measured:
    """One changed layer: its shape, norm and ranks, where its file says them without the base model."""

    module: str
    shape: tuple[int, int]
    rank: int | None
    norm: float
    rank_95: int | None
    rank_99: int | None


@dataclass
class Checked:
    """An adapter folder that may be published.

    Attributes:
        folder: where it lies.
        config: `adapter_config.json`, as it is on the disk.
        provenance: `surgery.json`, or an empty dictionary.
        card: `README.md`, or None.
        base: the Hub id of its base model.
        revision: the revision of the base model, or None.
        modules: number of layers that it changes.
        parameters: numbers that a trainer would train, heads included.
        bytes: size of `adapter_model.safetensors`.
        carried: what it brings whole: parameter -> shape.
        layers: the changed layers that could be measured.
        notes: what the user should know.
    """

    folder: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    card: str | None
    base: str
    revision: str | None
    modules: int
    parameters: int
    bytes: int
    carried: dict[str, tuple[int, ...]]
    layers: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peft_type(self) -> str:
        """The adapter's PEFT type."""
        return str(self.config["peft_type"])


def check_adapter(folder: Path, base_model: str | None = None) -> Checked:
    """Check that a folder is complete, that its tensors are finite and agree with its configuration.

    Args:
        folder: an adapter folder.
        base_model: the Hub id of its base model, `ORG/NAME` or `ORG/NAME@REVISION`, in place of what it names.

    Raises:
        AdapterError: a file is missing or broken, a tensor is not finite, PEFT would not use a tensor, or the
            configuration is not that of the tensors.
        HubError: the base model that the adapter names is no Hub id, or `README.md` is no UTF-8.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder; give the folder of an adapter")
    folder = inner_adapter(folder)
    _refuse_unreadable_card(folder / CARD_FILE)
    opened = Adapter.open(folder)  # maps the file, and reads of it only what is packed
    base, revision = base_model_id(folder, opened.config, base_model)
    weights = folder / WEIGHTS_FILE
    if opened.weights != weights:
        name = opened.weights.name if opened.weights is not None else "another format"
        raise AdapterError(f"{folder}: its tensors are in {name}, not in {WEIGHTS_FILE}; write it by surgery convert")
    header = read_header(weights).tensors
    kind = opened.peft_type
    if not _is_known(kind):
        raise AdapterError(f"{folder / CONFIG_FILE}: PEFT type {kind} is known neither to PEFT nor to surgery")
    found = foreign_format(header) if _prefix(kind) else None  # a learnt prompt has names of its own
    if found:
        raise AdapterError(f"{weights}: {found}")
    _refuse_not_finite(weights, header)
    # In memory codes are unpacked, and the experts of a fused parameter are layers of their own.
    packed = opened if is_packed(opened.config) or not opened.tensors.keys() <= header.keys() else None
    if not opened.as_stored and any("names of wrappers" in note for note in opened.notes):
        raise AdapterError(
            f"{weights}: {opened.notes[0]}, but PEFT does not open them; write it anew by surgery convert"
        )
    notes = [*opened.notes, *lacking_in(opened).notes]
    changed, carried = _sorted(opened, _prefix(kind))
    _check_targets(folder, opened.config, changed, carried)
    checked = Checked(
        folder=folder,
        config=opened.config,
        provenance=opened.provenance,
        card=opened.card,
        base=base,
        revision=revision,
        modules=len(changed),
        parameters=_trainable(opened, changed, carried),
        bytes=weights.stat().st_size,
        carried=carried,
        notes=notes,
    )
    del opened  # and with it the mapping of the file
    try:
        Adapter(checked.config, {}).readable_type()
    except AdapterError as error:
        checked.notes.append(f"its layers are not checked one by one: {_reason(error)}")
        return checked
    for module, layer in _layers(checked, changed, header, packed):
        measured = _checked_layer(layer, module)
        if measured is not None:
            checked.layers.append(measured)
    return checked


def base_model_id(folder: Path, config: Mapping[str, Any], given: str | None) -> tuple[str, str | None]:
    """The Hub id and revision of an adapter's base model.

    Raises:
        HubError: the one given is no Hub id, or none is given and the one that the adapter names is none.
    """
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    name = given if given is not None else str(named or "")
    match = BASE_ID.fullmatch(name)
    if match is not None and "/" not in match["repo"] and not is_legacy_id(match["repo"]):
        match = None
    if given is not None:
        if match is None:
            raise HubError(f"--base-model {given}: is no Hub id (ORG/NAME, or ORG/NAME@REVISION)")
        return _valid_base(match["repo"]), match["revision"]
    if match is None or _is_local(folder, name):
        # The place itself stays out of the message: it may end in a log that is published.
        what = f"{Path(name).name!r} on a disk" if named else "no base model"
        raise HubError(f"{folder}: names {what}, not a Hub id; say which model it is with --base-model ORG/NAME")
    return _valid_base(match["repo"]), match["revision"] or revision


def _valid_base(name: str) -> str:
    """A base model's name: a repository's, or one that the Hub knows without an organisation."""
    return name if is_legacy_id(name) else valid_id(name)


def valid_id(name: str) -> str:
    """A repository's name, `ORG/NAME`, as it is.

    Raises:
        HubError: the Hub takes no such name.
    """
    if REPO_ID.fullmatch(name) is None:
        raise HubError(f"{name!r}: is no repository's name, ORG/NAME")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise HubError(f"{name!r}: is no repository's name ({' '.join(str(error).split())})") from None
    return name


def _refuse_unreadable_card(path: Path) -> None:
    try:
        if path.is_file():
            path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise HubError(f"{path}: is not UTF-8 text; save it as UTF-8, and it is kept") from None
    except OSError as error:
        raise HubError(f"{path}: cannot be read ({error.strerror})") from None


def _is_local(folder: Path, name: str) -> bool:
    return Path(name).exists() or (folder.parent / name).exists()


def _reason(error: AdapterError) -> str:
    return str(error).removeprefix("the adapter: ")


def _refuse_not_finite(path: Path, header: Mapping[str, Tensor]) -> None:
    """Read every number, without mapping the file: mapped pages would count as memory of this process."""
    for name, tensor in header.items():
        dtype = DTYPE_OF_CODE.get(tensor.dtype)
        if dtype is None:
            raise AdapterError(f"{path}: {name} is {tensor.dtype}, which torch does not know")
        try:
            for piece in stored_pieces(path, tensor):
                values = torch.frombuffer(bytearray(piece), dtype=dtype)
                if values.is_floating_point() and not bool(torch.isfinite(values.float()).all()):
                    raise AdapterError(f"{path}: {name} holds NaN or Inf: the training diverged, or the file is broken")
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
    release_freed()


def _sorted(adapter: Adapter, prefix: str) -> tuple[dict[str, list[str]], dict[str, tuple[int, ...]]]:
    """The layers that an adapter changes, with the names of their tensors, and what it brings whole with its shape."""
    changed: dict[str, list[str]] = {}
    carried = {}
    for name, tensor in adapter.tensors.items():
        parts = name.removeprefix(MODEL_PREFIX).split(".")
        position = next((i for i, part in enumerate(parts) if prefix and part.startswith(prefix)), None)
        if position is not None and name.startswith(MODEL_PREFIX):
            changed.setdefault(".".join(parts[:position]), []).append(name)
        elif _is_above(name) or {"modules_to_save", "original_module"} & set(parts):
            continue
        elif position is None:
            carried[".".join(part for part in parts if part != "base_layer")] = tuple(tensor.shape)
    return changed, carried


def _is_above(name: str) -> bool:
    """Whether a tensor is one for all layers."""
    return name.startswith(TUNER_PREFIX) and not name.startswith(MODEL_PREFIX)


def _is_known(peft_type: str) -> bool:
    """Whether PEFT opens adapters of a type, with surgery or without."""
    if peft_type in ADAPTER_TYPES.names():
        return True
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # only for rarer types: importing peft takes seconds

    return peft_type in PEFT_TYPE_TO_CONFIG_MAPPING


def _prefix(peft_type: str) -> str:
    """What the names of a type's tensors start with; nothing for a learnt prompt."""
    known = type_of({"peft_type": peft_type}) if peft_type in ADAPTER_TYPES.names() else None
    if known is not None and known.prefix:
        return known.prefix
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type], PromptLearningConfig):
        return ""
    return str(PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_type, ""))


def _check_targets(
    folder: Path, config: Mapping[str, Any], changed: Collection[str], carried: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors that PEFT would not use: it ignores those of layers that the configuration does not name."""
    kind = str(config["peft_type"])
    if not changed and _prefix(kind):
        raise AdapterError(f"{folder / WEIGHTS_FILE}: changes no layer: none of its tensors is {kind}'s")
    check_patterns(folder, config, changed)
    lost = [module for module in changed if not _is_target(module, config)]
    if lost:
        raise AdapterError(
            f"{folder}: {WEIGHTS_FILE} has tensors for {listing(lost, 3)}, which {CONFIG_FILE} does not name as "
            "target: PEFT would ignore them"
        )
    names = [f".{name}" for name in carried]
    listed = list(config.get("modules_to_save") or ())
    missing = [m for m in listed if not any(f".{m}." in name or name.endswith(f".{m}") for name in names)]
    # For classifiers PEFT lists both names that a head may have; a model has one of them.
    if len(HEADS & set(missing)) < len(HEADS & set(listed)):
        missing = [module for module in missing if module not in HEADS]
    if missing:
        raise AdapterError(f"{folder}: {CONFIG_FILE} lists {missing[0]} in modules_to_save, {WEIGHTS_FILE} lacks it")


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear" or config.get("target_parameters"):
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    # An adapter on embeddings or fused layers keeps its tensors one level deeper.
    plain = module.removesuffix(".base_layer")
    return any(plain == target or plain.endswith(f".{target}") for target in targets)


def _trainable(adapter: Adapter, changed: Mapping[str, list[str]], carried: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers that train: what a method of ours names; everything of a type that we only read."""
    method = method_for_type(adapter.peft_type)
    names = set(method.trainable_names) if method is not None else None
    own = [name for tensors in changed.values() for name in tensors]
    return sum(
        adapter.tensors[name].numel() for name in own if names is None or name.rpartition(".")[2] in names
    ) + sum(math.prod(shape) for shape in carried.values())


def _layers(
    checked: Checked, changed: Mapping[str, list[str]], header: Mapping[str, Tensor], packed: Adapter | None
) -> Iterator[tuple[str, Adapter]]:
    """Each layer as an adapter of its own, its tensors read when it is asked for."""
    shared = [name for name in header if _is_above(name)]
    weights = checked.folder / WEIGHTS_FILE
    for module, own in changed.items():
        if packed is not None:
            yield module, Adapter(checked.config, {name: packed.tensors[name] for name in own})
        elif sum(header[name].size for name in [*own, *shared]) <= MOST_BYTES:
            yield module, Adapter(checked.config, {name: read_tensor(weights, name) for name in [*own, *shared]})
        release_freed()


def _checked_layer(layer: Adapter, module: str) -> Measured | None:
    """Check one layer, and measure its change where the file alone says what it is.

    Raises:
        AdapterError: it lacks tensors, or they do not fit each other or the configuration.
    """
    kind = layer.type
    if kind is not None and any(kind.unread(short) for short in layer.layer(module)):
        return None  # PEFT reads it, we do not
    contents_of(layer)
    try:
        delta = layer.delta(module)
    except AdapterError:  # it depends on the base model
        return None
    factors = delta.factors()
    rank = None if factors is None else int(factors[1].shape[0])
    if not has_cheap_spectrum(delta):
        return Measured(module, delta.shape, rank, float(delta.norm()), None, None)
    values = singular_values(delta)
    norm = float(values.square().sum().sqrt())
    return Measured(module, delta.shape, rank, norm, effective_rank(values, 0.95), effective_rank(values, 0.99))
