"""The request that a converter gets, and the result that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from surgery.converters.budget import Budget
from surgery.errors import MethodError
from surgery.passes.moments import Moments
from surgery.storage.resume import Parts
from surgery.storage.safetensors_read import file_bytes
from surgery.system.progress import Progress
from surgery.system.text import human_bytes

if TYPE_CHECKING:
    from surgery.adapters.source import Change

__all__ = ["BudgetError", "Metric", "Request", "Result", "saved_bytes"]


class Metric(Protocol):
    """Second moments by layer, where there is calibration data."""

    def reaches(self, change: Change) -> bool:
        """Whether the data says anything of a layer; known once its moments have been asked for."""

    def projected(self, change: Change) -> Moments:
        """Moments `(r, r)` of `A x` and `B^T g` for a layer's factors."""

    def full(self, change: Change) -> Moments:
        """Moments of x and g, `(in, in)` and `(out, out)`."""


@dataclass
class Request:
    """What a conversion is asked for, besides its source.

    Attributes:
        budget: how much to keep.
        source_bytes: size of the source's file.
        source_saved: bytes of it for tensors that are saved whole, and are not factors; 0 where there are none.
        saved: the tensors that are saved whole in the result, by their names in the file.
        dtype: of the new file's floating-point tensors; None for the source's own.
        metric: second moments, by the source's module names; None without data.
        options: the form's own options, each with its value.
        seed: of everything random.
        device: where to compute.
        progress: called after each layer.
        parts: takes finished layers, and has those that a run which was killed has left.
    """

    budget: Budget
    source_bytes: int
    source_saved: int = 0
    saved: Mapping[str, torch.Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    metric: Metric | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress | None = None
    parts: Parts = field(default_factory=Parts)

    @property
    def limit(self) -> int | None:
        """The most bytes that the file may have, where the budget says; tensors saved whole are added to a ratio's."""
        if self.budget.ratio is not None:
            return int((self.source_bytes - self.source_saved) / self.budget.ratio) + saved_bytes(self.saved)
        return self.budget.size

    def file_size(self, planned: Mapping[str, torch.Tensor]) -> int:
        """The size of a file with these tensors and those that are saved whole; they may be on the meta device."""
        return file_bytes({**self.saved, **planned})

    def too_small(self, needed: int, what: str) -> MethodError:
        """The error for a limit in bytes below what is needed for the least that a form can hold.

        Args:
            needed: bytes of the smallest file.
            what: what it holds besides the tensors that are saved whole.
        """
        besides = f" with {human_bytes(saved_bytes(self.saved))} of tensors saved whole" if self.saved else ""
        told = f"budget {human_bytes(self.limit or 0)} is too small: the least, {what}{besides}, is {needed} bytes"
        return BudgetError(told, needed)


class BudgetError(MethodError):
    """A budget holds nothing of any layer.

    Attributes:
        needed: bytes of the smallest file that holds something.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


def saved_bytes(saved: Mapping[str, torch.Tensor]) -> int:
    """Bytes of a file for tensors that are saved whole, their entries in its header included; 0 for none."""
    return file_bytes(saved) if saved else 0


@dataclass
class Result:
    """A converted adapter, before it is saved.

    Attributes:
        config: the keys of `adapter_config.json` that its type has; what all types have is added.
        tensors: by name in the file.
        ranks: rank by module; a module that is not here has no change left.
        trainable: numbers that a trainer would train, what is carried left out.
        bits: mean bits of a stored number by module, where they are codes.
        sizes: bytes of the file by module, where a layer's tensors do not say.
        notes: what the user should know.
        padding: bytes of zeros that bring all layers to one rank.
        gains: what gains on the base weight are on (rows, outputs, inputs), by module.
        gain_bytes: of the file, for these gains.
    """

    config: Mapping[str, Any]
    tensors: dict[str, torch.Tensor]
    ranks: dict[str, int]
    trainable: int = 0
    bits: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    padding: int = 0
    gains: dict[str, str] = field(default_factory=dict)
    gain_bytes: int = 0
