"""Writing one file so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import OutputError
from surgery.storage.locks import Held, hold

__all__ = ["atomic_file", "flush", "named_errors"]


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a path to write to; what is there takes the name of `target` when the block ends without an error.

    It is a hidden file beside the target, with the target's ending. What a killed run has left in it is written over.

    Raises:
        OutputError: it cannot be written, or another process is writing it.
    """
    partial = target.absolute().with_name(f".{target.stem}.partial{target.suffix}")
    lock: Held | None = None
    with named_errors(target):
        try:
            lock = hold(partial, create=True)
            yield partial
            flush(partial)
            partial.replace(target.absolute())
            with contextlib.suppress(OSError):  # not every file system lets a folder be opened and flushed
                flush(target.absolute().parent)
        except BaseException:
            _remove(partial, lock)
            raise
        finally:
            if lock is not None:
                lock.release()


@contextlib.contextmanager
def named_errors(target: Path) -> Iterator[None]:
    """What the system refuses in the block, which writes an output, is a named error.

    Raises:
        OutputError: it does.
    """
    try:
        yield
    except BlockingIOError:
        raise OutputError(f"{target}: another run is writing it") from None
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{target}: cannot be written ({reason}); nothing was changed") from None


def _remove(partial: Path, lock: Held | None) -> None:
    if lock is not None:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the system write what it still holds of a file or a folder."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
