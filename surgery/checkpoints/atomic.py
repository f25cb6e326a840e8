"""Writing a folder so that it appears whole or not at all.

The files are written to a hidden folder beside the target, flushed to the disk, checked, and only then renamed. An
output that is replaced stays in place until the moment its successor takes its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import OutputError

__all__ = ["atomic_folder", "check_output"]

PARTIAL = ".partial"


def check_output(target: Path, force: bool = False) -> None:
    """Check that an output folder may be written, before any work is done.

    Raises:
        OutputError: the target is a file, or a folder that is not empty and `force` is not set; or the folder that
            is to hold it cannot be written.
    """
    try:
        _check_output(target, force)
    except OSError as error:  # a name that no file system takes, a folder that may not be looked into
        raise OutputError(f"{target}: cannot be written ({error.strerror})") from None


def _check_output(target: Path, force: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target}: exists and is not a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise OutputError(
            f"{target}: exists and is not empty; choose another output with -o, or replace it with --force"
        )
    if target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"{target}: holds the working directory; choose another output with -o")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{target}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{target}: no permission to write in {parent}")


@contextlib.contextmanager
def atomic_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """Give a folder to write into that becomes `target` when the block ends without an error.

    Args:
        target: the folder to appear.
        force: replace a folder that is there.

    Raises:
        OutputError: the target may not be written, or writing fails (disk full, permission).
    """
    check_output(target, force)
    partial = target.absolute().parent / f".{target.absolute().name}{PARTIAL}"
    new_parents = [folder for folder in target.absolute().parents if not folder.exists()]
    lock: int | None = None
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            os.close(_lock(partial))
            shutil.rmtree(partial)  # left by a run that was killed
        partial.mkdir()
        lock = _lock(partial)
        yield partial
        _flush(partial)
        _put_in_place(partial, target.absolute())
    except BlockingIOError:
        raise OutputError(f"{target}: another run is writing it") from None
    except OSError as error:
        _discard(partial, new_parents)
        raise OutputError(f"{target}: cannot be written ({error.strerror or error}); nothing was changed") from None
    except BaseException:
        _discard(partial, new_parents)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int:
    """Mark a folder as being written by this process, until the descriptor is closed or the process ends.

    Raises:
        BlockingIOError: another process has marked it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _discard(partial: Path, new_parents: list[Path]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for folder in new_parents:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only where it is empty


def _flush(folder: Path) -> None:
    for path in [*sorted(folder.rglob("*")), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, target: Path) -> None:
    if target.exists() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        _exchange(partial, target)
        shutil.rmtree(partial)
    else:
        os.rename(partial, target)
    with contextlib.suppress(OSError):  # not every file system lets a folder be opened and flushed
        descriptor = os.open(target.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders: in one step where the system can, else so that the old one is never lost."""
    if sys.platform == "linux":
        at_current_folder, exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2") and not libc.renameat2(
            at_current_folder, os.fsencode(first), at_current_folder, os.fsencode(second), exchange
        ):
            return
    aside = first.with_name(f"{first.name}.old")
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        raise
    os.rename(aside, first)
