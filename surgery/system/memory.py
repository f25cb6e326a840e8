"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

__all__ = ["release_freed"]


@functools.cache
def _trim() -> Callable[[int], int] | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, "malloc_trim", None)  # glibc only


def release_freed() -> None:
    """Return the allocator's free pages to the system.

    Streaming frees and allocates buffers of many sizes, and glibc keeps the freed ones on its heap: without this the
    process grows with every weight although it holds only one.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
