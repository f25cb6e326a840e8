"""How much of an adapter a conversion is to keep; imports nothing heavy, so that what is wrong is told at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import MethodError
from surgery.system.text import parse_bytes

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """How much of an adapter to keep: at most one of these.

    Attributes:
        rank: per layer; shared for VeRA.
        energy: share of each layer's squared norm, in the metric where there is one.
        max_error: the largest relative error, in the metric where there is one, over all layers together.
        size: bytes of the whole file; also given as text, `64KiB`.
        ratio: bytes of the source's factors over those of the new ones, at least; tensors saved whole do not count.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    size: int | None = None
    ratio: float | None = None

    if TYPE_CHECKING:
        # For callers: a size may be text, which is bytes once the object is made.
        def __init__(
            self,
            rank: int | None = None,
            energy: float | None = None,
            max_error: float | None = None,
            size: int | str | None = None,
            ratio: float | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        if isinstance(self.size, str):
            try:
                object.__setattr__(self, "size", parse_bytes(self.size))
            except ValueError as error:
                raise MethodError(f"size: {error}") from None
        for name in ("energy", "max_error", "ratio"):
            if isinstance(getattr(self, name), int):
                object.__setattr__(self, name, float(getattr(self, name)))
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

    def describe(self) -> str:
        """The budget as an option of the command line, `--ratio 20`; empty for none."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return " ".join(f"--{name.replace('_', '-')} {value:.12g}" for name, value in given.items())
