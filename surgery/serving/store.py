"""A store of packed adapters behind a server: each is expanded into a plain LoRA when it is first asked for."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.adapters.adapter import Adapter
from surgery.adapters.names import CONFIG_FILE
from surgery.errors import AdapterError, CheckpointError, OptionError, WrongBaseError
from surgery.exporting.export import plain_parts, target_format
from surgery.serving.cache import FolderCache, Lease, file_digest
from surgery.storage.atomic_file import atomic_file
from surgery.storage.json_files import read_json, write_json
from surgery.system.text import parse_bytes
from surgery.version import __version__

__all__ = ["INDEX", "Store"]

INDEX = "surgery-store.json"
# Parts of a name between slashes: nothing that leads elsewhere, and nothing hidden.
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+=-]*")
LONGEST_NAME = 200
LARGEST_ID = (1 << 53) - 1


class Store:
    """A folder of adapters of one base model, each in a folder of its own, and a cache of what a server reads of them.

    Several processes may use one store and one cache at a time. Adapters may be added, replaced and removed while it is
    in use: what is expanded is known by the digest of the adapter's files.

    Args:
        folder: the adapters: `folder/NAME/adapter_config.json`; NAME may have slashes.
        cache: where expanded adapters lie; it is made if need be.
        max_bytes: what the cache may have, as a number or as in `20GiB`. What was not used for longest is removed.
        target: the server, as for `surgery.export`.
        base: the base model's name: adapters that name another one are refused. None takes all of them.
        model: the base model itself, a folder or a Hub id, for targets that need it.
        dtype: of the expanded numbers.

    Raises:
        AdapterError: there is no such folder.
        OptionError: the target or the size is unknown.
        OutputError: the cache cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        cache: str | Path,
        max_bytes: int | str = "20GiB",
        target: str = "vllm",
        *,
        base: str | None = None,
        model: str | Path | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        self.folder, self.target, self.base, self.model, self.dtype = Path(folder), target, base, model, dtype
        if not self.folder.is_dir():
            raise AdapterError(f"{folder}: no such folder of adapters")
        self._format = target_format(target)
        if dtype not in self._format.dtypes:
            raise OptionError(f"{self._format.title} reads no dtype {dtype!r}: use {', '.join(self._format.dtypes)}")
        try:
            limit = parse_bytes(max_bytes)
        except ValueError as error:
            raise OptionError(str(error)) from None
        self.cache = FolderCache(Path(cache).absolute(), limit)
        self._digests: dict[str, tuple[Any, str]] = {}

    def names(self) -> list[str]:
        """Return the names of the adapters that are there."""
        found = (path.parent.relative_to(self.folder).as_posix() for path in self.folder.rglob(CONFIG_FILE))
        return sorted(name for name in found if _is_name(name))

    def get(self, name: str) -> Path:
        """Return the folder that the server reads for an adapter, made if it is not there.

        It stays until the cache needs the room: `lease` keeps it.

        Raises:
            AdapterError: there is no such adapter, or it is damaged, or the server cannot hold it.
            WrongBaseError: it is for another base model.
            OutputError: the cache cannot be written, or is too small.
        """
        with self.lease(name) as path:
            return path

    @contextlib.contextmanager
    def lease(self, name: str) -> Iterator[Path]:
        """Give the folder that the server reads for an adapter, which is not removed within the block.

        Raises:
            AdapterError, WrongBaseError, OutputError: as for `get`.
        """
        lease = self.take(name)
        try:
            yield lease.path
        finally:
            lease.release()

    def take(self, name: str) -> Lease:
        """Return the folder that the server reads for an adapter, which is not removed before the lease is released.

        Raises:
            AdapterError, WrongBaseError, OutputError: as for `get`.
        """
        source = self.source(name)
        digest = self._digest(name, source)
        self._check_base(name, source)
        key = f"{name.replace('/', '~')}-{digest[:16]}"

        def make(partial: Path) -> None:
            # Nothing but the parts is held while they are written: an adapter is one copy of all numbers.
            parts = plain_parts(Adapter.open(source), self._format, self.model, dtype=self.dtype)[2]
            self._format.write(parts, partial, name)

        return self.cache.lease(key, make)

    def source(self, name: str) -> Path:
        """Return the folder of an adapter in the store.

        Raises:
            AdapterError: the name is none, or leads out of the store, or there is no adapter of that name.
        """
        if not _is_name(name):
            raise AdapterError(f"{name[:80]!r}: is no name of an adapter: letters, digits and _.@+=- between slashes")
        folder = self.folder / name
        inside, root = os.path.realpath(folder), os.path.realpath(self.folder)
        if os.path.commonpath([inside, root]) != root:
            raise AdapterError(f"{name!r}: is a link that leads out of the store {self.folder}")
        if not (folder / CONFIG_FILE).is_file():
            raise AdapterError(f"{name!r}: there is no adapter of this name in {self.folder}")
        return folder

    @staticmethod
    def id_of(name: str) -> int:
        """Return a number for a name, at least 1, the same in every process and on every machine."""
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % LARGEST_ID + 1

    def write_index(self) -> int:
        """Write the digests of all adapters beside them: an adapter that has changed since is then refused as damaged.

        Returns:
            The number of adapters.
        """
        digests = {name: _digest_of(self.source(name)) for name in self.names()}
        with atomic_file(self.folder / INDEX) as path:
            write_json(path, {"format_version": 1, "digests": digests})
        return len(digests)

    def _digest(self, name: str, source: Path) -> str:
        """Return the digest of an adapter's files together with all else that the expanded files depend on."""
        try:
            states = [path.stat() for path in _files_of(source)]
            identity = [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]
            known = self._digests.get(name)
            if known is not None and known[0] == identity:
                content = known[1]
            else:
                content = _digest_of(source)
                self._check_index(name, content)
                self._digests[name] = identity, content
        except OSError as error:
            raise AdapterError(f"{source}: cannot be read ({error.strerror or error})") from None
        made_by = f"{content} {self.target} {self.dtype} {self.model} {__version__}"
        return hashlib.blake2b(made_by.encode(), digest_size=16).hexdigest()

    def _check_index(self, name: str, digest: str) -> None:
        path = self.folder / INDEX
        if not path.is_file():
            return
        try:
            wanted = (read_json(path).get("digests") or {}).get(name)
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
        if wanted is not None and wanted != digest:
            raise AdapterError(
                f"{self.folder / name}: is not what {INDEX} says (its digest is another one): copy it again, or write "
                "the index again if it was replaced on purpose"
            )

    def _check_base(self, name: str, source: Path) -> None:
        if self.base is None:
            return
        try:
            found = read_json(source / CONFIG_FILE).get("base_model_name_or_path")
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
        if found != self.base:
            raise WrongBaseError(f"{name}: is for the base model {found!r:.100}, this store serves {self.base!r}")


def _is_name(name: str) -> bool:
    return len(name) <= LONGEST_NAME and all(PART.fullmatch(part) for part in name.split("/"))


def _files_of(source: Path) -> list[Path]:
    """Return the files that make an adapter: its configuration and its tensors."""
    return sorted(path for path in source.glob("adapter*") if path.is_file())


def _digest_of(source: Path) -> str:
    whole = "".join(f"{path.name} {file_digest(path)}\n" for path in _files_of(source))
    return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()
