"""Standard streams that are closed, full, or whose reader is gone: one line and exit 1, no traceback."""

from __future__ import annotations

import contextlib
import os
import sys

import click

__all__ = ["StreamLost", "drop", "open_missing", "stderr_was_lost", "write"]

STDOUT, STDERR = 1, 2
_lost: set[int] = set()


class StreamLost(click.ClickException):
    """Standard output cannot be written; the result was not printed."""

    def __init__(self, error: OSError) -> None:
        reason = error.strerror or type(error).__name__
        super().__init__(f"standard output cannot be written ({reason}): the result was not printed")


class _Closed:
    """Stands for a standard output that was closed before the program began."""

    encoding = "utf-8"
    errors = "strict"

    def write(self, text: str) -> int:
        raise OSError(9, os.strerror(9))

    def flush(self) -> None:
        """Do nothing: nothing was written."""

    def isatty(self) -> bool:
        """Return False."""
        return False


def open_missing() -> None:
    """Put the null device where a standard stream is closed, so that no file that is opened later takes its number.

    A closed standard output raises as soon as it is written to; a closed standard error, which somebody may want,
    swallows what it is given.
    """
    for number in (0, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - open until the program ends


def write(text: str, err: bool = False) -> None:
    """Print a line.

    A standard error that cannot be written is remembered (see `stderr_was_lost`): the work goes on.

    Raises:
        StreamLost: standard output cannot be written.
    """
    try:
        click.echo(text, err=err)
    except OSError as error:
        drop(STDERR if err else STDOUT)
        if not err:
            raise StreamLost(error) from None


def drop(number: int) -> None:
    """Send what is still buffered for a standard stream, and all that follows, to the null device."""
    _lost.add(number)
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def stderr_was_lost() -> bool:
    """Return whether a line for standard error could not be written."""
    return STDERR in _lost
