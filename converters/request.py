"""What a conversion is asked for, and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from surgery.errors import MethodError
from surgery.passes.moments import Moments
from surgery.storage.resume import Parts

if TYPE_CHECKING:
    from surgery.adapters.source import Change

__all__ = ["Budget", "Metric", "Request", "Result"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Budget:
    """How much of an adapter to keep: at most one of these.

    Attributes:
        rank: per layer; shared for VeRA.
        energy: share of each layer's squared norm, in the metric where there is one.
        max_error: the largest relative error, in the metric where there is one, over all layers together.
        size: bytes of the whole file.
        ratio: the source's file over the new one, at least.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    size: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise MethodError(f"give one of {', '.join(given)}, not several")
        if self.rank is not None and self.rank < 1:
            raise MethodError(f"rank must be at least 1, got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise MethodError(f"energy is a share between 0 and 1, got {self.energy}")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise MethodError(f"max_error is a share between 0 and 1, got {self.max_error}")
        if self.size is not None and self.size < 1:
            raise MethodError(f"size must be positive, got {self.size}")
        if self.ratio is not None and not 0 < self.ratio < math.inf:
            raise MethodError(f"ratio must be positive, got {self.ratio}")

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return any(value is not None for value in vars(self).values())

    def bytes(self, source_bytes: int) -> int | None:
        """The most bytes that the file may have, where the budget says."""
        if self.ratio is not None:
            return int(source_bytes / self.ratio)
        return self.size


class Metric(Protocol):
    """Second moments by layer, where there is calibration data."""

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
        dtype: of the new file's floating-point tensors; None for the source's own.
        metric: second moments, by the source's module names; None without data.
        bits: GIVA: `auto`, or the width of the codes.
        basis: VeRA: `fitted` or `random`.
        variant: SMoA: `components` or `blocks`.
        seed: of everything random.
        device: where to compute.
        accept_loss: make even what would be refused as useless.
        progress: called after each layer.
        parts: takes finished layers, and has those that a run which was killed has left.
    """

    budget: Budget
    source_bytes: int
    dtype: torch.dtype | None = None
    metric: Metric | None = None
    bits: int | str = "auto"
    basis: str = "fitted"
    variant: str = "components"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    accept_loss: bool = False
    progress: Progress | None = None
    parts: Parts = field(default_factory=Parts)


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
    """

    config: Mapping[str, Any]
    tensors: dict[str, torch.Tensor]
    ranks: dict[str, int]
    trainable: int = 0
    bits: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
