"""vLLM's plugin: adapters of a store, found by name while vLLM runs.

vLLM calls `register` through the entry point group `vllm.general_plugins`. It does nothing unless SURGERY_ADAPTERS
names a folder of adapters or a namespace of the Hub (`hf://ORG`); SURGERY_ADAPTERS_CACHE, SURGERY_ADAPTERS_MAX_BYTES
and SURGERY_ADAPTERS_DTYPE say where expanded ones lie, how many bytes of them, and of which numbers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.serving.cache import Lease
    from surgery.serving.store import Store

__all__ = ["ADAPTERS", "CACHE", "DTYPE", "LARGEST", "register"]

ADAPTERS, CACHE, LARGEST = "SURGERY_ADAPTERS", "SURGERY_ADAPTERS_CACHE", "SURGERY_ADAPTERS_MAX_BYTES"
DTYPE = "SURGERY_ADAPTERS_DTYPE"
NAME = "surgery"
# vLLM reads the files after it was told of them: the last ones are kept that long.
KEPT = 32
log = logging.getLogger("surgery")


def register() -> None:
    """Register a resolver of adapter names with vLLM, where SURGERY_ADAPTERS names a store.

    Raises:
        SurgeryError: the store or its cache cannot be used.
    """
    folder = os.environ.get(ADAPTERS)
    if not folder:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from surgery.serving.store import Store

    cache, largest = os.environ.get(CACHE) or _default_cache(), os.environ.get(LARGEST) or "20GiB"
    store = Store(folder, cache, largest, "vllm", dtype=os.environ.get(DTYPE) or "bfloat16")
    LoRAResolverRegistry.register_resolver(NAME, _resolver(store))


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgery" / "adapters"


def _resolver(store: Store) -> Any:
    """Return an object of vLLM's class for resolvers."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class StoreResolver(LoRAResolver):
        """Finds adapters in a store."""

        def __init__(self) -> None:
            self.found = _Found(store)

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """Return vLLM's request for an adapter; None where the store has none of this name for this base."""
            path = await asyncio.to_thread(self.found.path, base_model_name, lora_name)
            if path is None:
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=store.id_of(lora_name), lora_path=path)

    return StoreResolver()


class _Found:
    """The adapters that were given to vLLM last, kept until it has read them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._leases: OrderedDict[str, Lease] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, base_model_name: str, name: str) -> str | None:
        """Return the folder of an adapter for a base; None, with a line in the log, where it cannot be had."""
        from surgery.errors import SurgeryError

        try:
            wanted = self.store.base_of(name)
            if wanted != base_model_name:
                log.warning("%s: is for the base model %r, vLLM serves %r", name, wanted, base_model_name)
                return None
            lease = self.store.take(name)
        except SurgeryError as error:
            log.error("%s", error)
            return None
        with self._lock:
            old = self._leases.pop(name, None)
            self._leases[name] = lease
            dropped = [old] if old is not None else []
            if len(self._leases) > KEPT:
                dropped.append(self._leases.popitem(last=False)[1])
        for each in dropped:
            each.release()
        return str(lease.path)
