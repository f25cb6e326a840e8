"""How much of an adapter a conversion keeps: the refusal of one that keeps too little, and the size worth having."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

from surgery.converters.budget import Budget
from surgery.converters.report import ConvertReport
from surgery.errors import MethodError

__all__ = ["ENOUGH", "LEAST", "WORTH_HAVING", "Made", "size_option", "smallest_keeping", "what_is_kept"]

# Less is refused; less than enough gets a note, and the default budget gives way; a suggested size keeps so much.
LEAST, ENOUGH, WORTH_HAVING = 0.5, 0.8, 0.9
# Of the loss that is allowed, a result that uses so much is not searched on.
USED = 0.85
ERROR_TRIES, SIZE_TRIES = 3, 10
STEP = 1.08
# A small file that leaves so many bytes of its budget has no use for them.
SLACK = 160


class Made(Protocol):
    """A conversion that was made."""

    @property
    def report(self) -> ConvertReport: ...


M = TypeVar("M", bound=Made)


def smallest_keeping(share: float, attempt: Callable[[Budget], M]) -> tuple[int, M] | None:
    """Search for the smallest size in bytes at which a form keeps a share of the adapter.

    The layers' error that goes with the share is a first guess; the size that it takes is tried as a size, and raised
    until the result keeps the share. What is returned was made at that very size.

    Args:
        share: of the adapter.
        attempt: makes the form within a budget; takes budgets of `max_error` and `size`.

    Returns:
        The size, as `size_option` can write it, and what was made in it; None where no size keeps so much.
    """
    size = _by_error(1 - share, attempt)
    if size is None:
        return None
    for _ in range(SIZE_TRIES):
        size = _rounded(size)
        made = _tried(attempt, Budget(size=size))
        if made is not None and made.report.kept >= share:
            return size, made
        if made is not None and made.report.bytes < min(size / STEP**2, size - SLACK):
            return None  # it has all the room that it can use
        size = math.ceil(size * STEP)
    return None


def _by_error(loss: float, attempt: Callable[[Budget], M]) -> int | None:
    """Return about the size that loses this share, by results of a given error; None where there are none."""
    squared, best = loss, None
    for _ in range(ERROR_TRIES):
        made = _tried(attempt, Budget(max_error=math.sqrt(squared)))
        if made is None:
            break
        lost = 1 - made.report.kept
        if best is None or (lost <= loss and (made.report.bytes < best.bytes or 1 - best.kept > loss)):
            best = made.report
        if USED * loss <= lost <= loss:
            break
        squared = min(squared * min(max(0.95 * loss / max(lost, 1e-12), 0.1), 10.0), 0.95)
    return best.bytes if best is not None else None


def _tried(attempt: Callable[[Budget], M], budget: Budget) -> M | None:
    try:
        return attempt(budget)
    except MethodError:  # codes of so few bits do not reach the error, or so few bytes hold nothing
        return None


def _rounded(size: int) -> int:
    """The size rounded up to what `size_option` can write."""
    unit = 1024 if size >= 10240 else 102.4
    return int(math.ceil(size / unit) * unit)


def size_option(size: int) -> str:
    """Return `--size 12.3KiB`, which the command line reads as at least the size that `smallest_keeping` returned."""
    return f"--size {size // 1024}KiB" if size >= 10240 else f"--size {math.ceil(size / 102.4) / 10:.1f}KiB"


def what_is_kept(report: ConvertReport) -> str:
    """Return what the share in `report.kept` is a share of."""
    if report.kl is not None:
        return "of what the adapter does to the predictions (KL divergence)"
    if report.cosine is not None or report.squared_error is not None:
        return "of what the adapter does to the outputs"
    return "of the change's squared norm" if report.output_error is None else "of what the adapter does to the layers"
