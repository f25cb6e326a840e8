"""A store of packed adapters behind a server: each is expanded into a plain LoRA when it is first asked for."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from surgery.adapters.adapter import Adapter
from surgery.adapters.names import CONFIG_FILE
from surgery.errors import AdapterError, CheckpointError, OptionError, WrongBaseError
from surgery.exporting.export import plain_parts, target_format
from surgery.serving.cache import FolderCache, Lease
from surgery.serving.sources import HUB, INDEX, AdapterSource, FolderSource, HubSource
from surgery.storage.json_files import read_json
from surgery.system.text import parse_bytes
from surgery.version import __version__

__all__ = ["INDEX", "Store"]

LARGEST_ID = (1 << 53) - 1


class Store:
    """Adapters of one base model, in a folder or a namespace of the Hub, and a cache of what a server reads of them.

    Several processes may use one store and one cache at a time. Adapters may be added, replaced and removed while it is
    in use: what is expanded is known by the digest of the adapter's files.

    Args:
        folder: the adapters: `folder/NAME/adapter_config.json`, NAME may have slashes; or `hf://NAMESPACE`, whose
            repositories are the adapters: `NAME` or `NAME@REVISION`. Without `hf://` no network is used.
        cache: where expanded adapters lie, and downloaded ones; it is made if need be.
        max_bytes: what the cache may have, as a number or as in `20GiB`. What was not used for longest is removed.
        target: the server, as for `surgery.export`.
        base: the base model's name: adapters that name another one are refused. None takes all of them.
        model: the base model itself, a folder or a Hub id, for targets that need it.
        dtype: of the expanded numbers.
        refresh: seconds for which the commit of a repository on the Hub counts as its newest.

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
        refresh: float = 60.0,
    ) -> None:
        self.target, self.base, self.model, self.dtype = target, base, model, dtype
        self.folder: str | Path = str(folder) if str(folder).startswith(HUB) else Path(folder)
        local = FolderSource(self.folder) if isinstance(self.folder, Path) else None
        self._format = target_format(target)
        if dtype not in self._format.dtypes:
            raise OptionError(f"{self._format.title} reads no dtype {dtype!r}: use {', '.join(self._format.dtypes)}")
        try:
            limit = parse_bytes(max_bytes)
        except ValueError as error:
            raise OptionError(str(error)) from None
        self.cache = FolderCache(Path(cache).absolute(), limit)
        self._source: AdapterSource = local or HubSource(str(folder), self.cache, refresh)
        self._bases: dict[str, tuple[str, Any]] = {}

    def names(self) -> list[str]:
        """Return the names of the adapters that are there."""
        return self._source.names()

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
        content = self._source.content(name)
        self._check_base(name, content)
        made_by = f"{content} {self.target} {self.dtype} {self.model} {__version__}"
        digest = hashlib.blake2b(made_by.encode(), digest_size=16).hexdigest()
        key = f"{name.replace('/', '~')}-{digest[:16]}"
        found = self.cache.look(key)
        if found is not None:
            return found
        # A download is there before the lock of the expanded entry is asked for, and for as long as that is held.
        with self._source.folder(name, content) as source:
            return self.cache.lease(key, partial(self._expand, source, name))

    def _expand(self, source: Path, name: str, out: Path) -> None:
        """Write what the server reads of an adapter into an empty folder."""
        # Held are the whole numbers of the packed file; floats are made of them one layer at a time, as written.
        adapter = Adapter.open(source, compact=True)
        parts = plain_parts(adapter, self._format, self.model, dtype=self.dtype, on_demand=True)[2]
        self._format.write(parts, out, f"{name} in {self.cache.folder}")

    def base_of(self, name: str) -> Any:
        """Return the base model that an adapter names, by its configuration.

        Raises:
            AdapterError: there is no such adapter, or it is damaged.
        """
        return self._base(name, self._source.content(name))

    @staticmethod
    def id_of(name: str) -> int:
        """Return a number for a name, at least 1, the same in every process and on every machine."""
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % LARGEST_ID + 1

    def write_index(self) -> int:
        """Write the digests of all adapters beside them: an adapter that has changed since is then refused as damaged.

        Returns:
            The number of adapters.
        """
        return self._source.write_index()

    def _base(self, name: str, content: str) -> Any:
        known = self._bases.get(name)
        if known is None or known[0] != content:
            with self._source.folder(name, content) as source:
                try:
                    known = content, read_json(source / CONFIG_FILE).get("base_model_name_or_path")
                except CheckpointError as error:
                    raise AdapterError(str(error)) from None
            self._bases[name] = known
        return known[1]

    def _check_base(self, name: str, content: str) -> None:
        found = self._base(name, content) if self.base is not None else None
        if found != self.base:
            raise WrongBaseError(f"{name}: is for the base model {found!r:.100}, this store serves {self.base!r}")
