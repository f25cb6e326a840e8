"""The tensors that an adapter saves whole (heads, biases, embeddings), and those of them that a result must have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from surgery.adapters.fitting import located
from surgery.adapters.source import Source
from surgery.converters.request import saved_bytes
from surgery.errors import CheckpointError
from surgery.models.base_model import BaseModel

__all__ = ["SavedTensors", "saved_tensors"]

# Rows of a large tensor are compared some at a time: so many numbers.
NUMBERS = 1 << 22


@dataclass(frozen=True)
class SavedTensors:
    """The tensors that are saved whole.

    Attributes:
        tensors: those that the result has, by their names in the file.
        source_bytes: bytes of the source's file for those that it has, spare copies included.
        modules: the modules of `tensors`, by their last names.
        dropped: names in the file of those that are the base's own.
        modules_to_save: the configuration's entry for the result.
    """

    tensors: Mapping[str, torch.Tensor]
    source_bytes: int
    modules: list[str]
    dropped: list[str]
    modules_to_save: list[str] | None

    @property
    def bytes(self) -> int:
        """Bytes of a file for `tensors`."""
        return saved_bytes(self.tensors)

    def notes(self) -> list[str]:
        """Return a line for tensors that were left out."""
        if not self.dropped:
            return []
        return [f"left out, equal to the base's to the bit: {', '.join(self.dropped)}"]


def saved_tensors(source: Source) -> SavedTensors:
    """Return the tensors that a result of this source has whole: all but those that equal the base's to the bit.

    Without a base all are kept. Biases are kept in any case, and of a module that the configuration says is saved
    either all tensors or none: PEFT expects them.
    """
    found = source.carried
    listed = source.adapter.config.get("modules_to_save") or []
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    dropped = _equal_to_base(source, names) if source.base is not None else []
    kept = {name: tensor for name, tensor in found.items() if name not in dropped}
    gone = {name for name in names if any(_is_of(name, key) for key in dropped)}
    spare = {name: source.adapter.tensors[name] for name in source.contents.spare}
    left = [name for name in names if name not in gone]
    return SavedTensors(
        tensors=kept,
        source_bytes=saved_bytes({**found, **spare}),
        modules=_modules(kept),
        dropped=dropped,
        modules_to_save=(left or None) if gone else source.adapter.config.get("modules_to_save"),
    )


def _equal_to_base(source: Source, listed: Iterable[str]) -> list[str]:
    assert source.base is not None
    equal = {
        name
        for parameter, name in source.contents.carried.items()
        if _is_base_value(source.base, parameter, source.adapter.tensors[name])
    }
    for module in listed:
        own = {name for name in source.contents.carried.values() if _is_of(module, name)}
        if not own <= equal:
            equal -= own
    return sorted(name for name in equal if not name.endswith(".bias") or any(_is_of(m, name) for m in listed))


def _is_of(module: str, name: str) -> bool:
    """Whether a tensor belongs to a module of this name, or of one that ends with it."""
    return f".{module}." in f".{name}"


def _is_base_value(base: BaseModel, parameter: str, tensor: torch.Tensor) -> bool:
    place = located(parameter, base.shapes, base)
    if place is None or place not in base.sources or base.shapes[place] != tuple(tensor.shape):
        return False
    try:
        value = base.parameter(place)
    except CheckpointError:  # a head of another number of labels than the checkpoint's
        return False
    wide = torch.promote_types(value.dtype, tensor.dtype)
    pieces = zip(value.reshape(-1).split(NUMBERS), tensor.reshape(-1).split(NUMBERS), strict=True)
    return all(torch.equal(one.to(wide), other.to(wide)) for one, other in pieces)


def _modules(tensors: Iterable[str]) -> list[str]:
    owners = (name.removesuffix(".weight").removesuffix(".bias").removesuffix(".base_layer") for name in tensors)
    return list(dict.fromkeys(owner.rpartition(".")[2] for owner in owners))
