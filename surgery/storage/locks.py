"""Locks between processes, and between the threads of one: kept by the system, and gone with the process.

Lock files go through `filelock`, on every system. What is written itself, a folder or a file, is marked by its own
descriptor where the system has `flock`, so that nothing lies beside it; where it has not (Windows), by a lock file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from surgery.errors import OutputError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "Held",
    "exclusive_folder",
    "exclusive_lock",
    "hold",
    "shared_lock",
    "try_exclusive",
    "try_exclusive_lock",
]


@dataclass
class Held:
    """A mark on a file or folder that this process writes.

    Attributes:
        release: takes the mark away.
        by_name: the mark belongs to the path, whatever lies there; otherwise to the folder or file, whatever its name.
    """

    release: Callable[[], None]
    by_name: bool = False


def hold(path: Path, create: bool = False) -> Held:
    """Mark a folder or a file as being written by this process, until it is released or the process ends.

    Args:
        path: what is written.
        create: make it, as an empty file, where it is not there.

    Raises:
        BlockingIOError: another process has marked it, or has removed or renamed it meanwhile.
        OSError: it cannot be opened.
    """
    if fcntl is None:
        return _lock_file_beside(path, create)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the opening and the marking another process may have removed it, or given it its final name.
        if not os.path.lexists(path) or not os.path.samestat(os.fstat(descriptor), path.lstat()):
            raise BlockingIOError
    except BaseException:
        os.close(descriptor)
        raise
    return Held(lambda: os.close(descriptor))


def _lock_file_beside(path: Path, create: bool) -> Held:
    lock = FileLock(_beside(path))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BlockingIOError from None
    if create:
        path.touch()

    def release() -> None:
        lock.release()
        with contextlib.suppress(OSError):  # another process holds it already
            _beside(path).unlink(missing_ok=True)

    if not path.exists():
        release()
        raise BlockingIOError
    return Held(release, by_name=True)


def _beside(path: Path) -> Path:
    return path.absolute().with_name(f".{path.name.lstrip('.')}.lock")


@contextlib.contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; wait while another one has it. File systems without locks do not wait."""
    if fcntl is None:
        with exclusive_lock(_beside(folder)):
            yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold a lock file, made if need be, for this thread alone; wait while another one has it."""
    with FileLock(path):
        yield


@contextlib.contextmanager
def try_exclusive_lock(path: Path) -> Iterator[bool]:
    """Hold a lock file, made if need be, for this thread alone, and give True; give False where another one has it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def shared_lock(folder: Path) -> int:
    """Mark a folder as being used, beside others that use it; closing the returned descriptor ends that.

    Raises:
        FileNotFoundError: there is no such folder, or it was removed meanwhile.
        OutputError: the system has no shared locks.
    """
    if fcntl is None:
        raise OutputError(f"{folder}: a store shares its folders between processes, which this system cannot lock")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(folder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def try_exclusive(folder: Path) -> int | None:
    """Return a descriptor that holds a folder which nobody uses, until it is closed; None where somebody does."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
