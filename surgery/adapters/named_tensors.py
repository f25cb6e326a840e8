"""Tensors by name, as a dictionary that knows when a name comes or goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["NamedTensors"]


class NamedTensors(dict[str, torch.Tensor]):
    """A dictionary of tensors by name.

    What is sorted by the names is sorted again when `version` has changed, so that a look at one layer does not go
    through the names of all others.

    Attributes:
        version: grows whenever a name is added or taken away; not when a tensor is replaced.
    """

    version: int = 0

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self:
            self.version += 1
        super().__setitem__(name, tensor)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.version += 1

    def __ior__(self, other: Any) -> NamedTensors:  # type: ignore[override,misc]
        self.update(other)
        return self

    def clear(self) -> None:
        """Remove all."""
        super().clear()
        self.version += 1

    def pop(self, name: str, *default: Any) -> Any:
        """Remove a name and return its tensor, or the default."""
        self.version += 1
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, torch.Tensor]:
        """Remove and return the last name and its tensor."""
        self.version += 1
        return super().popitem()

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return the tensor of a name, which is the default where there was none."""
        if name not in self:
            self[name] = default
        return self[name]

    def update(  # type: ignore[override]
        self, *others: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], **named: Any
    ) -> None:
        """Add the tensors of others."""
        self.version += 1
        super().update(*others, **named)
