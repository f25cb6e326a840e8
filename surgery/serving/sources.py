"""Where the adapters of a store come from: a folder, or the repositories of a namespace on the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.adapters.names import CONFIG_FILE
from surgery.errors import AdapterError, CheckpointError, OptionError, UnreachableError
from surgery.serving.cache import FolderCache, Lease, file_digest
from surgery.storage.atomic_file import atomic_file
from surgery.storage.hub_cache import download_files, newest_commit, repos_in
from surgery.storage.json_files import read_json, write_json

__all__ = ["HUB", "INDEX", "AdapterSource", "FolderSource", "HubSource", "is_name"]

HUB = "hf://"
INDEX = "surgery-store.json"
# Parts of a name between slashes: nothing that leads elsewhere, and nothing hidden.
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+=-]*")
LONGEST_NAME = 200
# What a namespace and a revision look like; the Hub's own rules are narrower.
NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
ADAPTER_FILES = ("adapter*", "surgery.json")


class AdapterSource(ABC):
    """Adapters by name."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all adapters."""

    @abstractmethod
    def content(self, name: str) -> str:
        """Return what recognises an adapter's files: another text once they have changed.

        Raises:
            AdapterError: there is no such adapter, or it cannot be read.
        """

    @abstractmethod
    def folder(self, name: str, content: str) -> contextlib.AbstractContextManager[Path]:
        """Give an adapter's folder, which is there within the block.

        Raises:
            AdapterError: it cannot be had, or is damaged.
        """

    @abstractmethod
    def write_index(self) -> int:
        """Write the digests of all adapters, and return how many there are."""


class FolderSource(AdapterSource):
    """Adapters in folders of their own inside one folder.

    Args:
        root: that folder.

    Raises:
        AdapterError: there is none.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise AdapterError(f"{root}: no such folder of adapters")
        self.root = root
        self._digests: dict[str, tuple[Any, str]] = {}

    def names(self) -> list[str]:
        found = (path.parent.relative_to(self.root).as_posix() for path in self.root.rglob(CONFIG_FILE))
        return sorted(name for name in found if is_name(name))

    def content(self, name: str) -> str:
        source = self.path(name)
        try:
            states = [path.stat() for path in _files_of(source)]
            identity = [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]
            known = self._digests.get(name)
            if known is not None and known[0] == identity:
                return known[1]
            found = _digest_of(source)
            self._check_index(name, found)
            self._digests[name] = identity, found
        except OSError as error:
            raise AdapterError(f"{source}: cannot be read ({error.strerror or error})") from None
        return found

    @contextlib.contextmanager
    def folder(self, name: str, content: str) -> Iterator[Path]:
        yield self.path(name)

    def path(self, name: str) -> Path:
        """Return the folder of an adapter.

        Raises:
            AdapterError: the name is none, or leads out of the store, or there is no adapter of that name.
        """
        _check_name(name)
        folder = self.root / name
        inside, root = os.path.realpath(folder), os.path.realpath(self.root)
        if os.path.commonpath([inside, root]) != root:
            raise AdapterError(f"{name!r}: is a link that leads out of the store {self.root}")
        if not (folder / CONFIG_FILE).is_file():
            raise AdapterError(f"{name!r}: there is no adapter of this name in {self.root}")
        return folder

    def write_index(self) -> int:
        digests = {name: _digest_of(self.path(name)) for name in self.names()}
        with atomic_file(self.root / INDEX) as path:
            write_json(path, {"format_version": 1, "digests": digests})
        return len(digests)

    def _check_index(self, name: str, digest: str) -> None:
        path = self.root / INDEX
        if not path.is_file():
            return
        try:
            wanted = (read_json(path).get("digests") or {}).get(name)
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
        if wanted is not None and wanted != digest:
            raise AdapterError(
                f"{self.root / name}: is not what {INDEX} says (its digest is another one): copy it again, or write "
                "the index again if it was replaced on purpose"
            )


class HubSource(AdapterSource):
    """Adapters in the repositories of a namespace on the Hub: `NAME`, or `NAME@REVISION`, for `NAMESPACE/NAME`.

    The files are downloaded when an adapter is first expanded, checked against the Hub's digests, and lie in the
    store's cache, as its other entries do. The Hub is asked for the newest commit of a repository at most once in
    `refresh` seconds; where it cannot be reached, the one that was used last counts.

    Args:
        namespace: `hf://NAMESPACE`.
        cache: where downloads go.
        refresh: seconds.

    Raises:
        OptionError: the namespace is none.
    """

    def __init__(self, namespace: str, cache: FolderCache, refresh: float = 60.0) -> None:
        self.namespace = namespace.removeprefix(HUB).rstrip("/")
        if not NAMESPACE.fullmatch(self.namespace):
            raise OptionError(f"{namespace}: is no namespace of the Hub, which is given as {HUB}NAMESPACE")
        self.cache, self.refresh = cache, refresh
        self._commits: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return sorted(repo.partition("/")[2] for repo in repos_in(self.namespace))

    def content(self, name: str) -> str:
        repo, revision = self._repo(name)
        with self._lock:
            known = self._commits.get(name)
        if known is not None and time.monotonic() - known[0] < self.refresh:
            return known[1]
        try:
            commit = newest_commit(repo, revision)
        except UnreachableError as error:
            last = known[1] if known is not None else self._last(name)
            if last is None:
                raise AdapterError(str(error)) from None
            commit = last
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
        with self._lock:
            self._commits[name] = time.monotonic(), commit
        return commit

    @contextlib.contextmanager
    def folder(self, name: str, content: str) -> Iterator[Path]:
        lease = self._downloaded(name, content)
        try:
            yield lease.path
        finally:
            lease.release()
            self.cache.shrink()  # what is expanded meanwhile could not take its place

    def write_index(self) -> int:
        raise OptionError(f"{HUB}{self.namespace}: has no index: the Hub itself has the digests of its files")

    def _downloaded(self, name: str, commit: str) -> Lease:
        repo, _ = self._repo(name)

        def make(partial: Path) -> None:
            try:
                download_files(repo, commit, partial, ADAPTER_FILES)
            except CheckpointError as error:
                raise AdapterError(str(error)) from None
            if not (partial / CONFIG_FILE).is_file():
                raise AdapterError(f"{repo}: is no adapter: it has no {CONFIG_FILE}")

        return self.cache.lease(f"{self._prefix(name)}{commit}", make)

    def _prefix(self, name: str) -> str:
        return f"hub~{self.namespace}~{name.replace('/', '~')}~"

    def _last(self, name: str) -> str | None:
        """Return the commit of an adapter that was used last, of those in the cache."""
        found = sorted(self.cache.used(self._prefix(name)))
        return found[-1][1].removeprefix(self._prefix(name)) if found else None

    def _repo(self, name: str) -> tuple[str, str | None]:
        _check_name(name)
        plain, _, revision = name.partition("@")
        if "/" in plain:
            raise AdapterError(f"{name!r}: is no repository of {self.namespace}: its name has no slash")
        return f"{self.namespace}/{plain}", revision or None


def is_name(name: str) -> bool:
    """Return whether a text may be an adapter's name."""
    return len(name) <= LONGEST_NAME and all(PART.fullmatch(part) for part in name.split("/"))


def _check_name(name: str) -> None:
    if not is_name(name):
        raise AdapterError(f"{name[:80]!r}: is no name of an adapter: letters, digits and _.@+=- between slashes")


def _files_of(source: Path) -> list[Path]:
    """Return the files that make an adapter: its configuration and its tensors."""
    return sorted(path for path in source.glob("adapter*") if path.is_file())


def _digest_of(source: Path) -> str:
    whole = "".join(f"{path.name} {file_digest(path)}\n" for path in _files_of(source))
    return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()
