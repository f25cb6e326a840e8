"""An adapter folder in PEFT's format: read whole, carried whole, written atomically and verified."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from surgery.adapters.companions import copy_companions
from surgery.adapters.experts import experts_apart, experts_joined
from surgery.adapters.format_registry import AdapterParts, format_of
from surgery.adapters.inner_folders import inner_adapter
from surgery.adapters.named_tensors import NamedTensors
from surgery.adapters.names import (
    CARD_FILE,
    CONFIG_FILE,
    MODEL_PREFIX,
    PROVENANCE_FILE,
    TUNER_PREFIX,
    WEIGHTS_FILE,
    TensorNames,
)
from surgery.adapters.packing import is_packed, packed
from surgery.adapters.types.base import AdapterType
from surgery.adapters.types.registry import readable_types, type_of
from surgery.errors import AdapterError, CheckpointError, OutputError, listing
from surgery.models.sites import Form
from surgery.storage.atomic_folder import atomic_folder
from surgery.storage.folder_checks import check_files
from surgery.storage.hub_cache import local_folder
from surgery.storage.json_files import read_json, write_json
from surgery.storage.resume import file_identities
from surgery.storage.safetensors_read import file_bytes
from surgery.storage.safetensors_write import tensor_bytes, verify_file, write_tensors
from surgery.system.keywords import keywords
from surgery.system.tensors import MadeTensors, MutableTensors, TensorMap, whole
from surgery.system.threads import one_torch_thread

if TYPE_CHECKING:
    from surgery.deltas.operators import Delta

__all__ = ["Adapter", "bits_equal", "identity_of"]


class Adapter:
    """A PEFT adapter: configuration, tensors, provenance.

    Attributes:
        config: `adapter_config.json`, every key of it.
        tensors: every tensor of `adapter_model.safetensors` by its name there, what surgery interprets and what it
            only carries (heads, biases, embeddings) alike. Codes of a packed GiVA file are unpacked here, and packed
            again when it is saved.
        provenance: `surgery.json`, or an empty dictionary.
        card: `README.md`, or None.
        folder: where it was read from, or None.
        weights: the file that its tensors were read from, or None.
        name: what it is called where it was read from: the folder's name, or the last part of a Hub id; or None.
        notes: what the user should know of its file.
        as_stored: PEFT opens the folder that it was read from as this adapter: its names are those of the file.
        companions: files that belong to it (tokenizer, chat templates, processors) and go where it goes: name -> path.
    """

    notes: list[str]
    companions: dict[str, Path]
    as_stored: bool = True

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        provenance: Mapping[str, Any] | None = None,
        card: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.config = dict(config)
        self.tensors = tensors
        self.provenance = dict(provenance or {})
        self.card = card
        self.folder = folder
        self.name = folder.resolve().name if folder is not None else None
        self.notes, self.companions = [], {}
        self.weights: Path | None = None
        self._sorted: tuple[int, TensorNames] | None = None

    @classmethod
    def open(cls, adapter: str | Path, layout: str | None = None, *, compact: bool = False) -> Adapter:
        """Read an adapter folder in any known format, or an adapter repository on the Hub.

        Args:
            adapter: the folder, or the Hub id.
            layout: order of the numbers of a LoRA on fused experts: `peft` (default), or `unsloth` for its older files.
            compact: hold the factors of a packed file as its whole numbers, a quarter of the memory. A factor is made
                float32 whenever `tensors` is asked for it, and a change to it in place is lost.

        Raises:
            AdapterError: a file is missing, broken, or holds code.
            CheckpointError: there is no such folder or repository.
        """
        folder = inner_adapter(local_folder(str(adapter)))
        try:
            check_files(folder)
            parts = format_of(folder).read(folder)
            read = cls.from_parts(parts if compact else replace(parts, tensors=whole(parts.tensors)), folder)
        except CheckpointError as error:  # of the files; here they are an adapter's
            raise AdapterError(str(error)) from None
        if not Path(adapter).is_dir():  # an id: the folder is a snapshot of the cache
            read.name = str(adapter).partition("@")[0].rstrip("/").rpartition("/")[2]
        read.tensors, notes = experts_apart(read.config, read.tensors, read.label, layout)
        read.notes += notes
        read.as_stored = read.as_stored and layout in (None, "peft")
        return read

    @classmethod
    def from_parts(cls, parts: AdapterParts, folder: Path | None = None) -> Adapter:
        """Return the adapter that a format has read."""
        read = cls(parts.config, parts.tensors, parts.provenance, parts.card, folder)
        read.notes, read.weights, read.as_stored = list(parts.notes), parts.weights, parts.as_stored
        read.companions = dict(parts.companions)
        return read

    def like(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Adapter:
        """Return a copy with another configuration and other tensors, and all else as it is."""
        made = Adapter(config, tensors, self.provenance, self.card, self.folder)
        made.name, made.notes, made.as_stored = self.name, list(self.notes), False
        made.weights = self.weights
        made.companions = dict(self.companions)
        return made

    def __repr__(self) -> str:
        modules = sum(1 for module in self.modules if module)
        return f"Adapter({self.peft_type}, {modules} modules, {len(self.tensors)} tensors)"

    @property
    def tensors(self) -> NamedTensors | MadeTensors:
        """Every tensor by its name in the file."""
        return self._tensors

    @tensors.setter
    def tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors if isinstance(tensors, MadeTensors) else NamedTensors(tensors)
        self._sorted = None

    @property
    def peft_type(self) -> str:
        """The adapter's PEFT type."""
        return str(self.config["peft_type"])

    @property
    def label(self) -> str:
        """The adapter's name in messages: its folder, or "the adapter"."""
        return str(self.folder) if self.folder is not None else "the adapter"

    @property
    def type(self) -> AdapterType | None:
        """The entry of its type in the registry of adapter types; None for a type that is not known."""
        return type_of(self.config)

    @property
    def modules(self) -> dict[str, MutableTensors]:
        """Tensors by module and short name: `modules["encoder.layer.0.output.dense"]["inilora_A"]`.

        LoRA's short names have two parts, `lora_A.weight`. Tensors that sit above the model (VeRA's projections) are
        under the empty module name.
        """
        return {module: self.layer(module) for module in self.names.by_module}

    def layer(self, module: str) -> MutableTensors:
        """The tensors of one module by short name, as in `modules`, without a look at the others; empty for none."""
        names = self.names.by_module.get(module, {})
        if not isinstance(self.tensors, MadeTensors):
            return {short: self.tensors[name] for short, name in names.items()}
        planned = {short: self.tensors.planned[name] for short, name in names.items()}
        return MadeTensors(planned, lambda short: self.tensors[names[short]])

    def holders(self, short: str) -> list[str]:
        """The modules that have a tensor of this short name, in the file's order."""
        return self.names.holders.get(short, [])

    @property
    def foreign(self) -> str | None:
        """Which other tool's format the names are (see `foreign_format`), or None for PEFT's."""
        return self.names.foreign

    @property
    def names(self) -> TensorNames:
        """The names of its tensors, sorted by module."""
        # Sorted once for all layers, and anew where a caller has added tensors or taken some away.
        if self._sorted is None or self._sorted[0] != self._tensors.version:
            self._sorted = self._tensors.version, TensorNames(list(self._tensors), self.type)
        return self._sorted[1]

    @property
    def file_size(self) -> int:
        """Bytes of the file that its tensors were read from, or that they would take as they are."""
        if self.weights is None or self.weights.suffix == ".json":  # the index of several files
            return file_bytes(self.file_tensors())
        return self.weights.stat().st_size

    def form(self, module: str) -> Form:
        """How the weight of one layer is stored, as far as the adapter's own files say."""
        kind = self.type
        return Form() if kind is None else kind.form(self.config, module, self.layer(module))

    def opened_on(self, model: Any) -> Adapter:
        """Return the adapter in the type that is opened on a loaded model: itself, but for stock FROD.

        Args:
            model: its base model, with its weights.

        Raises:
            AdapterError: it cannot be brought to that type.
        """
        address = self.type.opened_as if self.type is not None else None
        if address is None:
            return self
        module, _, function = address.partition(":")
        opened: Adapter = getattr(importlib.import_module(module), function)(self, model)
        return opened

    def delta(self, module: str, weight: torch.Tensor | None = None) -> Delta:
        """Return the weight change of one layer, float32, `(out, in)` whatever the orientation of the layer's weight.

        Args:
            module: the layer's name, as in `modules`.
            weight: its base weight `(out, in)`, for the types that need it; for VeRA and RandLoRA, whose files do not
                say how wide a layer is, only its shape counts.

        Returns:
            The change on the CPU, where the file's tensors are, or on the device of `weight` for a type that needs it.

        Raises:
            AdapterError: there is no such layer, the type or variant is not read, the file stores no bases, tensors are
                broken, or the weight is needed.
        """
        kind = self.readable_type()
        if not module or not self.layer(module):
            raise AdapterError(
                f"the adapter changes no module {module!r}; it has {listing(sorted(filter(None, self.modules)), 4)}"
            )
        return kind.changes(self, None).delta(module, weight)

    def readable_type(self) -> AdapterType:
        """Return the adapter's type, refusing what cannot be read exactly by its configuration or its names.

        Raises:
            AdapterError: the type or variant cannot be read, or the names are those of another tool.
        """
        kind = self.type
        if kind is None:
            raise AdapterError(
                f"{self.label}: the weight change of a {self.peft_type} adapter is not known here, only those of "
                f"{', '.join(readable_types())}"
            )
        kind.refuse(self.config, self.label)
        if self.foreign is not None:
            raise AdapterError(f"{self.label}: {self.foreign}")
        return kind

    def same_as(self, other: Adapter) -> bool:
        """Whether another adapter has the same settings and the same tensors to the last bit, in memory or saved."""
        if self.config != other.config and _as_saved(self.config) != _as_saved(other.config):
            return False
        if self.tensors.keys() != other.tensors.keys():
            return False
        return all(bits_equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())

    def file_tensors(self) -> TensorMap:
        """The tensors as the file holds them."""
        if not is_packed(self.config):
            return experts_joined(self.config, self.tensors)
        return packed(self.config, self.tensors, TUNER_PREFIX, MODEL_PREFIX)

    @keywords()
    def save(self, folder: str | Path, overwrite: bool = False) -> int:
        """Write the adapter and read it back.

        The folder appears whole or not at all; the tensors are read back and compared before it takes its name.

        Args:
            folder: where to.
            overwrite: replace a folder that is there.

        Returns:
            Bytes of `adapter_model.safetensors`.

        Raises:
            OutputError: the folder may not be written, writing fails, or what was written is not what was meant.
        """
        with atomic_folder(Path(folder), overwrite) as partial:
            return self.write(partial, str(folder))

    @classmethod
    def from_pretrained(cls, adapter: str | Path) -> Adapter:
        """Return what `open` returns, under the name that transformers and PEFT use."""
        return cls.open(adapter)

    @keywords()
    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> int:
        """Write the adapter as `save` does, under the name that transformers and PEFT use.

        A folder that is there is refused without `overwrite`, where PEFT writes into it.
        """
        return self.save(folder, overwrite)

    def write(self, partial: Path, target: str, tensors: Mapping[str, torch.Tensor] | None = None) -> int:
        """Write the adapter's files into a folder that is there, and read them back.

        Args:
            partial: the folder.
            target: what an error calls it.
            tensors: what the file is to hold, in place of `file_tensors`; each is asked for when it is written, so that
                of some mappings one is held at a time.

        Returns:
            Bytes of `adapter_model.safetensors`.

        Raises:
            OutputError: what was written is not what was meant.
        """
        weights = partial / WEIGHTS_FILE
        write_json(partial / CONFIG_FILE, self.config)
        try:
            digests = write_tensors(weights, self.file_tensors() if tensors is None else tensors, {"format": "pt"})
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"{target}: {WEIGHTS_FILE} cannot be written ({reason}); nothing was changed") from None
        copy_companions(self.companions, partial)
        if self.provenance:
            write_json(partial / PROVENANCE_FILE, self.provenance)
        if self.card is not None:
            (partial / CARD_FILE).write_text(self.card, encoding="utf-8")
        try:
            if read_json(partial / CONFIG_FILE) != _as_saved(self.config):
                raise OutputError(f"{target}: {CONFIG_FILE} read back differs from what was written")
            verify_file(weights, digests, target)
        except CheckpointError as error:
            raise OutputError(f"{target}: what was written cannot be read back ({error})") from None
        return weights.stat().st_size


def identity_of(adapter: Adapter, given: Any) -> Any:
    """What recognises an adapter: its files where a name was given, otherwise its settings and tensors to the last bit.

    Args:
        adapter: as it was opened.
        given: what the caller gave: a name, or the adapter itself, which may have been changed since it was opened.
    """
    if adapter.folder is not None and not isinstance(given, Adapter):
        return file_identities(adapter.folder)
    digest = xxhash.xxh3_128()
    digest.update(json.dumps([_as_saved(adapter.config), adapter.provenance], sort_keys=True, default=str).encode())
    for name, tensor in sorted(adapter.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in tensor_bytes(tensor):
            digest.update(piece)
    return digest.hexdigest()


def _as_saved(config: Mapping[str, Any]) -> Any:
    """A configuration as JSON gives it back: lists for tuples, names for numbers as keys."""
    return json.loads(json.dumps(config, default=str))


def bits_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are the same to the last bit, NaN included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if not first.numel():
        return True
    # Compared as bytes: exact for every dtype.
    one, two = (each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (first, second))
    with one_torch_thread():  # bound by memory
        return torch.equal(one, two)
