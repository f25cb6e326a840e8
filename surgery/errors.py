"""The errors that surgery raises on purpose.

Everything a user can cause is a `SurgeryError`: the command line prints its one line and exits with 1. Any
other exception that reaches the user is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DataError",
    "HubError",
    "MethodError",
    "NumericsError",
    "OptionError",
    "OutputError",
    "SurgeryError",
    "TargetError",
    "UnreachableError",
    "WrongBaseError",
    "first_line",
    "listing",
]


class SurgeryError(Exception):
    """Base of every error that names a problem in the input, the options or the output place.

    Attributes:
        told: whether another of several processes tells the user.
    """

    told = False


class CheckpointError(SurgeryError):
    """A base model folder cannot be used: a file is missing, broken, or of a kind that is not supported."""


class UnreachableError(CheckpointError):
    """The Hub cannot be reached, or answers that it cannot serve now: what is in the cache may still do."""


class AdapterError(SurgeryError):
    """An adapter folder cannot be used: a file is missing, or configuration and tensors disagree."""


class TargetError(SurgeryError):
    """No module, or no module that can be adapted, matches what was asked for."""


class MethodError(SurgeryError):
    """An adapter method cannot do what was asked of it, or does not take an option."""


# Both are method errors as well: 0.1.0 raised that for everything, and callers catch it.
class OptionError(MethodError, ValueError):
    """An option is out of range, unknown, or does not go with another one."""


class NumericsError(MethodError):
    """A result is not finite: an overflow, or values that were not finite to begin with."""


class DataError(SurgeryError):
    """A data file cannot be used: it is missing, broken, empty, or lacks what the task needs."""


class OutputError(SurgeryError):
    """The output cannot be written where it was asked for."""


class HubError(SurgeryError):
    """Something cannot be pushed: the Hub refuses it or cannot be reached, or it holds what should stay private."""


class WrongBaseError(SurgeryError, ValueError):
    """An adapter was opened on another base model than the one it was made from."""


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of another library's error, its kind where it says nothing; cut to so many characters."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:most]


def listing(names: Iterable[str], limit: int = 10) -> str:
    """Join names for a message: the first `limit`, then how many more there are."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … and {len(names) - limit} more"
