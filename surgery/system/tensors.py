"""Names for the types of which most signatures speak, and tensors that are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping

import torch

__all__ = ["MadeTensors", "MutableTensors", "TensorMap", "Tensors", "planned"]

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

    Attributes:
        planned: as given, and kept up to date.
    """

    def __init__(self, planned: TensorMap, make: Callable[[str], torch.Tensor]) -> None:
        self.planned = dict(planned)
        self._make = make

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self.planned[name]
        return self._make(name) if found.is_meta else found

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.planned[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self.planned[name]

    def __contains__(self, name: object) -> bool:
        return name in self.planned

    def __iter__(self) -> Iterator[str]:
        return iter(self.planned)

    def __len__(self) -> int:
        return len(self.planned)


def planned(tensors: TensorMap) -> TensorMap:
    """Return tensors of the same names, shapes and dtypes without making any: on the meta device where they are made."""
    return tensors.planned if isinstance(tensors, MadeTensors) else tensors
