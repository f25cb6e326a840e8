"""Names for the types of which most signatures speak, and tensors that are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping

import torch

__all__ = ["MadeTensors", "MutableTensors", "TensorMap", "Tensors", "planned", "whole"]

Tensors = dict[str, torch.Tensor]
# Tensors by name that the receiver only reads.
TensorMap = Mapping[str, torch.Tensor]
MutableTensors = MutableMapping[str, torch.Tensor]


class MadeTensors(MutableTensors):
    """Tensors by name, some of which are made anew each time they are asked for: what is made is not held.

    Changing such a tensor in place changes nothing here; put another one in its place.

    Args:
        planned: by name, tensors that are there, and in place of those that are made, tensors of their shapes and
            dtypes on the meta device.
        make: returns the tensor of a name.
        let_go: is called with the name of a tensor that will not be made again.

    Attributes:
        planned: as given, and kept up to date.
        version: grows whenever a name is added or taken away.
    """

    version: int = 0

    def __init__(
        self, planned: TensorMap, make: Callable[[str], torch.Tensor], let_go: Callable[[str], object] | None = None
    ) -> None:
        self.planned = dict(planned)
        self._make, self._let_go = make, let_go

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self.planned[name]
        return self._make(name) if found.is_meta else found

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.version += name not in self.planned
        self.planned[name] = tensor

    def __delitem__(self, name: str) -> None:
        found = self.planned.pop(name)
        self.version += 1
        if found.is_meta and self._let_go is not None:
            self._let_go(name)

    def __contains__(self, name: object) -> bool:
        return name in self.planned

    def __iter__(self) -> Iterator[str]:
        return iter(self.planned)

    def __len__(self) -> int:
        return len(self.planned)


def whole(tensors: TensorMap) -> Tensors:
    """Return all tensors as a dictionary; of those that are made when asked for, what they were made of is let go."""
    if not isinstance(tensors, MadeTensors):
        return dict(tensors)
    return {name: tensors.pop(name) for name in list(tensors)}


def planned(tensors: TensorMap) -> TensorMap:
    """Return tensors of the same names, shapes and dtypes without making any: those are on the meta device."""
    return tensors.planned if isinstance(tensors, MadeTensors) else tensors
