"""The search for the most that a budget in bytes holds, for all forms."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["largest"]


def largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the largest number from `low` to `high` that fits, None where not even `low` does.

    Args:
        fits: whether a number fits; where one does, all smaller ones do.
        low: the smallest number.
        high: the largest one.
    """
    if high < low or not fits(low):
        return None
    if fits(high):
        return high
    while high - low > 1:  # `low` fits, `high` does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
