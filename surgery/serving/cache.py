"""A bounded cache of folders: each made once, by one process at a time, and the longest unused removed first.

An entry is a folder that appears whole or not at all, with `ENTRY` in it: the digests of its files. Locks are kept by
the system, so that a killed process leaves none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from surgery.errors import CheckpointError, OutputError
from surgery.storage.atomic_folder import atomic_folder
from surgery.storage.json_files import read_json, write_json
from surgery.storage.locks import exclusive_lock, shared_lock, try_exclusive, try_exclusive_lock
from surgery.system.text import human_bytes

__all__ = ["ENTRY", "FolderCache", "Lease", "file_digest"]

ENTRY = "surgery-entry.json"
LOCKS = ".locks"
# Names share this many locks: makers of two names may wait for each other, and the folder of locks stays small.
STRIPES = 256
CHUNK = 1 << 20


@dataclass(frozen=True)
class Lease:
    """A folder of the cache that is not removed while the lease is held.

    Attributes:
        path: the folder.
        made: whether this request made it; otherwise it was there.
    """

    path: Path
    made: bool
    descriptor: int

    def release(self) -> None:
        """Let the cache remove the folder."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


class FolderCache:
    """Folders by key.

    Args:
        folder: where they lie.
        max_bytes: what all of them together may have; leased ones are not removed, and may go beyond it for a while.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._checked: dict[str, tuple[tuple[int, int, int], ...]] = {}
        self._sizes: dict[tuple[str, int], int] = {}
        try:
            (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: the cache cannot be made ({error.strerror or error})") from None
        self._remove_partial()

    def lease(self, key: str, make: Callable[[Path], None]) -> Lease:
        """Return the folder of a key, made where it is not there or is damaged.

        Args:
            key: a name for one file system entry.
            make: fills an empty folder.

        Raises:
            OutputError: it cannot be written, or is larger than the cache.
        """
        entry = self.folder / key
        found = self.look(key)
        if found is not None:
            return found
        with exclusive_lock(self._lock_of(key)):
            found = self.look(key)  # another one may have made it while this one waited
            if found is not None:
                return found
            with atomic_folder(entry, force=True) as partial:
                make(partial)
                digests = _digests(partial)
                size = _size(partial)
                if size > self.max_bytes:
                    raise OutputError(
                        f"{self.folder}: {key} takes {human_bytes(size)}, and the cache may have "
                        f"{human_bytes(self.max_bytes)}; raise max_bytes"
                    )
                write_json(partial / ENTRY, {"digests": digests})
            descriptor = shared_lock(entry)
            self._checked[key] = _identities(entry)
        self.shrink()
        return Lease(entry, True, descriptor)

    def look(self, key: str) -> Lease | None:
        """Return the folder of a key where it is there and whole."""
        found = self._taken(self.folder / key)
        return None if found is None else Lease(self.folder / key, False, found)

    def used(self, prefix: str) -> list[tuple[float, str]]:
        """Return when each folder whose key begins so was used last, and the key."""
        return [(when, path.name) for when, _, path in self._entries() if path.name.startswith(prefix)]

    def shrink(self) -> None:
        """Remove the folders that were not used for longest, until the rest is within the bound."""
        with exclusive_lock(self.folder / LOCKS / "shrink"):
            entries = sorted(self._entries(), key=lambda entry: entry[0])
            total = sum(size for _, size, _ in entries)
            for _, size, path in entries:
                if total <= self.max_bytes:
                    break
                held = try_exclusive(path)
                if held is None:
                    continue  # somebody uses it
                try:
                    aside = self.folder / f".{path.name}.old"
                    os.rename(path, aside)  # in one step: nobody finds half of it
                    shutil.rmtree(aside, ignore_errors=True)
                    total -= size
                finally:
                    os.close(held)

    @property
    def bytes(self) -> int:
        """What all folders together have."""
        return sum(size for _, size, _ in self._entries())

    def _taken(self, entry: Path) -> int | None:
        """Return a descriptor that leases a folder which is there and whole; None for another one."""
        try:
            descriptor = shared_lock(entry)
        except OSError:
            return None
        if self._is_whole(entry):
            with contextlib.suppress(OSError):
                os.utime(entry)  # by which the longest unused is found
            return descriptor
        os.close(descriptor)
        return None

    def _is_whole(self, entry: Path) -> bool:
        """Return whether the files of an entry are those that were written; they are read once, then only looked at."""
        try:
            found = _identities(entry)
            if self._checked.get(entry.name) == found:
                return True
            if read_json(entry / ENTRY).get("digests") != _digests(entry):
                return False
        except (OSError, CheckpointError):
            return False
        self._checked[entry.name] = found
        return True

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Yield when each folder was used last, its bytes, and its path."""
        for path in self.folder.iterdir():
            if not path.name.startswith("."):
                with contextlib.suppress(OSError):
                    state = path.stat()
                    known = path.name, state.st_ino  # an entry is never written to: what it has is counted once
                    if known not in self._sizes:
                        self._sizes[known] = _size(path)
                    yield state.st_mtime, self._sizes[known], path

    def _remove_partial(self) -> None:
        """Remove what killed processes have left, as far as nobody is writing it."""
        for path in self.folder.iterdir():
            if not path.name.startswith(".") or path.name == LOCKS or not path.is_dir():
                continue
            key = path.name.removeprefix(".").rpartition(".")[0]
            with try_exclusive_lock(self._lock_of(key)) as mine:
                if mine:
                    shutil.rmtree(path, ignore_errors=True)

    def _lock_of(self, key: str) -> Path:
        """Return the file that is locked while a folder is made."""
        return self.folder / LOCKS / f"{xxhash.xxh3_64_intdigest(key.encode()) % STRIPES:03d}"


def file_digest(path: Path) -> str:
    """Return a digest of a file's bytes: it guards against damage, not against attackers."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digests(folder: Path) -> dict[str, str]:
    """Return the digests of a folder's files but for `ENTRY`, by their names in it."""
    return {str(path.relative_to(folder)): file_digest(path) for path in _files(folder) if path.name != ENTRY}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _identities(folder: Path) -> tuple[tuple[int, int, int], ...]:
    """Return what changes with the files of a folder: where, how large and of when they are."""
    states = (path.stat() for path in _files(folder))
    return tuple((state.st_ino, state.st_size, state.st_mtime_ns) for state in states)
