"""The layers and biases that an adapter's configuration names and its file lacks, beside a base model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from surgery.adapters.adapter import Adapter
from surgery.adapters.completeness import starts_otherwise
from surgery.adapters.regex_check import check_patterns
from surgery.adapters.types.lora import A_NAME, B_NAME
from surgery.adapters.types.registry import type_of
from surgery.errors import AdapterError, CheckpointError, listing
from surgery.models.sites import role_by_name
from surgery.storage.folder_checks import check_files
from surgery.storage.hub_cache import cached_files
from surgery.storage.json_files import read_json
from surgery.storage.safetensors_read import TensorFiles
from surgery.storage.safetensors_write import read_header

if TYPE_CHECKING:
    from surgery.models.module_names import ModelNames

__all__ = ["Lacking", "lacking_in"]

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Lacking:
    """What an adapter's file lacks beside a base model, or beside the one that it names where that is at hand.

    Attributes:
        layers: targets of the configuration without tensors, by the adapter's names.
        notes: what the user should know of it.
    """

    layers: list[str]
    notes: list[str]


def lacking_in(adapter: Adapter, names: ModelNames | None = None) -> Lacking:
    """Find what an adapter's file lacks of what its configuration names.

    Args:
        adapter: the adapter.
        names: those of the base model; None looks for the base that the adapter names among local files.

    Raises:
        AdapterError: PEFT would not leave what is missing as it is in the base.
    """
    base = _of_model(names) if names is not None else _of_files(adapter)
    changed = list(dict.fromkeys(filter(None, adapter.names.owners.values())))
    if not changed:
        return Lacking([], [])
    layers = _lacking_layers(adapter, changed, base) if base is not None else []
    kind = type_of(adapter.config)
    if layers and (kind is None or not kind.starts_idle or starts_otherwise(adapter.config)):
        raise AdapterError(
            f"{adapter.label}: the file lacks {len(layers)} of the layers that adapter_config.json names "
            f"({listing(layers, 3)}); save the adapter again"
        )
    notes = []
    if layers:
        notes.append(
            f"the file lacks {len(layers)} of the layers that adapter_config.json names ({listing(layers, 3)}): they "
            "stay as they are in the base"
        )
    elif base is None:
        notes += _unused_targets(adapter, changed)
    notes += _odd_rows(adapter, changed, base)
    if base is not None:
        notes += _lacking_biases(adapter, changed, base)
    return Lacking(layers, notes)


@dataclass(frozen=True)
class _Base:
    """Layers of a base: name -> shape of the weight where it is known; names of biases; an adapter's name there."""

    shapes: Mapping[str, tuple[int, ...] | None]
    biases: Collection[str]
    place: Callable[[str], str | None]


def _of_model(names: ModelNames) -> _Base:
    parameters = names.parameters
    shapes = {
        key.removesuffix(".weight"): tuple(parameters[key].shape) for key in parameters if key.endswith(".weight")
    }
    biases = [key for key in parameters if key.endswith("bias")]
    return _Base(shapes, biases, lambda module: names.located(module, shapes))


def _of_files(adapter: Adapter) -> _Base | None:
    """The base that an adapter names, by its files' headers, where it is a folder or in the Hub's cache."""
    name = adapter.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    try:
        tensors = _headers(name)
    except (CheckpointError, OSError, ValueError):
        return None  # whoever opens it says what is wrong with it
    if not tensors:
        return None
    shapes = {key.removesuffix(".weight"): shape for key, shape in tensors.items() if key.endswith(".weight")}
    biases = [key for key in tensors if key.endswith("bias")]
    endings = _endings(shapes)
    return _Base(shapes, biases, lambda module: module if module in shapes else _by_ending(module, endings))


def _headers(name: str) -> dict[str, tuple[int, ...] | None]:
    folder = Path(name)
    if folder.is_dir():
        check_files(folder)
        files = TensorFiles.open(folder).files
        found: dict[str, tuple[int, ...] | None] = {}
        for path in sorted(set(files.values())):
            found.update({key: tensor.shape for key, tensor in read_header(path).tensors.items()})
        return found
    cached = cached_files(name, (INDEX_FILE, SINGLE_FILE))
    if INDEX_FILE in cached:
        index = read_json(cached[INDEX_FILE]).get("weight_map")
        return dict.fromkeys(index) if isinstance(index, dict) else {}
    if SINGLE_FILE in cached:
        return {key: tensor.shape for key, tensor in read_header(cached[SINGLE_FILE]).tensors.items()}
    return {}


def _endings(names: Collection[str]) -> dict[str, list[str]]:
    """Every ending of names that begins at a level -> the names that end so, at most two."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            same = found.setdefault(".".join(parts[start:]), [])
            if len(same) < 2:
                same.append(name)
    return found


def _by_ending(module: str, endings: Mapping[str, list[str]]) -> str | None:
    """The name that ends as a module's does from its first number on; None where there is none, or several."""
    parts = module.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 1)
    found = endings.get(".".join(parts[max(number - 1, 0) :]), [])
    return found[0] if len(found) == 1 else None


def _lacking_layers(adapter: Adapter, changed: list[str], base: _Base) -> list[str]:
    """Targets without tensors: other layers of the roles that are there, and targets that are nowhere."""
    check_patterns(adapter.folder, adapter.config, base.shapes.keys())
    layers_of: dict[str, set[int | None]] = {}
    for name in base.shapes:
        role, layer = role_by_name(name)
        layers_of.setdefault(role, set()).add(layer)
    lacking, seen = [], set(changed)
    for module in changed:
        role, layer = role_by_name(module)
        place = base.place(module) if layer is not None else None
        if place is None or role in seen:
            continue
        seen.add(role)
        for other in sorted(each for each in layers_of[role_by_name(place)[0]] if each is not None):
            name = role.replace("*", str(other), 1)
            if name not in seen and _is_target(adapter.config, name):
                lacking.append(name)
    for target in _listed_targets(adapter.config):
        if not any(_ends(module, target) for module in changed):
            lacking += [
                name for name, shape in base.shapes.items() if _ends(name, target) and len(shape or (0, 0)) == 2
            ]
    return list(dict.fromkeys(lacking))


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts a module of this name."""
    if config.get("target_modules") == "all-linear":
        return True
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    targets = config.get("target_modules")
    if isinstance(targets, list) and not any(config.get(key) for key in keys[1:]):
        return module in targets or module.endswith(tuple(f".{target}" for target in targets))  # as PEFT does
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = SimpleNamespace(**{key: config.get(key) for key in keys}, target_parameters=None)
    settings.target_modules = settings.target_modules or []
    return check_target_module_exists(settings, module) is not None and bool(
        check_target_module_exists(settings, module)
    )


def _listed_targets(config: Mapping[str, Any]) -> list[str]:
    targets = config.get("target_modules")
    saved = set(config.get("modules_to_save") or ())
    return (
        [each for each in targets if isinstance(each, str) and each not in saved] if isinstance(targets, list) else []
    )


def _ends(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _unused_targets(adapter: Adapter, changed: list[str]) -> list[str]:
    """A note on targets of which nothing is in the file, where no base says whether the model has them."""
    unused = [each for each in _listed_targets(adapter.config) if not any(_ends(module, each) for module in changed)]
    if not unused:
        return []
    return [f"adapter_config.json names {listing(unused, 3)} as target, the file has no tensors for it"]


def _odd_rows(adapter: Adapter, changed: list[str], base: _Base | None) -> list[str]:
    """A note on factors of a LoRA whose rows or columns are not those of their layer."""
    sizes: dict[str, dict[str, tuple[int, int]]] = {}
    for module in changed:
        tensors = adapter.layer(module)
        if A_NAME in tensors and B_NAME in tensors and tensors[A_NAME].ndim == tensors[B_NAME].ndim == 2:
            size = int(tensors[B_NAME].shape[0]), int(tensors[A_NAME].shape[1])
            sizes.setdefault(role_by_name(module)[0], {})[module] = size
    notes = []
    for group in sizes.values():
        for module, size in group.items():
            expected = _expected(module, group, base)
            if expected is not None and not set(size) <= set(expected):
                notes.append(
                    f"{module}: its factors make {size[0]} x {size[1]}, the layer has the shape {expected[0]} x "
                    f"{expected[1]}: a part of its rows is missing, or it is for another base model"
                )
    return notes


def _expected(module: str, group: Mapping[str, tuple[int, int]], base: _Base | None) -> tuple[int, ...] | None:
    """The shape of a layer by the base, or by the other layers of its role of which it would be a shard."""
    if base is not None:
        place = base.place(module)
        shape = base.shapes[place] if place is not None else None
        return shape if shape is not None and len(shape) == 2 else None
    most = max(group.values())
    mine = group[module]
    return most if all(whole % part == 0 for whole, part in zip(most, mine, strict=True)) else None


def _lacking_biases(adapter: Adapter, changed: list[str], base: _Base) -> list[str]:
    """A note on biases that are trained by the configuration and are not in the file."""
    mode = adapter.config.get("bias")
    if mode not in {"all", "lora_only"}:
        return []
    saved = {name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in adapter.tensors}
    places = {module: base.place(module) for module in changed}
    wanted = {f"{place}.bias": f"{module}.bias" for module, place in places.items() if place is not None}
    names = [key for key in base.biases if mode == "all" or key in wanted]
    there = {base.place(name.removesuffix(".bias")) for name in saved if name.endswith(".bias")}
    missing = [wanted.get(key, key) for key in names if key.removesuffix(".bias") not in there and key not in saved]
    if not missing:
        return []
    return [
        f"the file lacks {len(missing)} biases that were trained (bias={mode}): {listing(missing, 3)} stay the base's"
    ]
