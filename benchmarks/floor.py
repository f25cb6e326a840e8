"""The least time that a piece of work can take on this machine: bytes and operations over measured rates."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Rates", "Work", "rates"]

BYTES = 256 << 20
SIDE = 1536
RUNS = 3


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second, with all cores.

    Attributes:
        read: bytes of a file that the system has in memory.
        written: bytes into a file, flushed to the disk.
        memory: bytes copied from memory to memory.
        float32: operations of a matrix product.
        float64: the same in double precision.
    """

    read: float
    written: float
    memory: float
    float32: float
    float64: float


@dataclass(frozen=True)
class Work:
    """What a case cannot do without.

    Attributes:
        read: bytes from files.
        written: bytes into files.
        float32: operations of matrix products.
        float64: the same in double precision.
        memory: bytes that are read from memory or written to it, where no product does.
    """

    read: float = 0
    written: float = 0
    float32: float = 0
    float64: float = 0
    memory: float = 0

    def seconds(self) -> float:
        """The least time, if reading and computing overlap and writing comes after."""
        rate = rates()
        computing = self.float32 / rate.float32 + self.float64 / rate.float64 + self.memory / rate.memory
        return max(self.read / rate.read, computing) + self.written / rate.written


@functools.cache
def rates() -> Rates:
    """Measured once, the best of a few runs."""
    import numpy as np

    block = np.ones(BYTES, dtype=np.uint8)
    other = np.empty_like(block)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block"

        def write() -> None:
            with path.open("wb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())

        def read() -> None:
            with path.open("rb") as file:
                file.readinto(other)

        written = BYTES / _best(write)
        found = BYTES / _best(read)
    copied = 2 * BYTES / _best(lambda: np.copyto(other, block))
    return Rates(found, written, copied, _products(np.float32), _products(np.float64))


def _products(dtype: Any) -> float:
    import numpy as np

    left = np.ones((SIDE, SIDE), dtype)
    return float(2 * SIDE**3 / _best(lambda: left @ left))


def _best(work: Callable[[], Any]) -> float:
    taken = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(taken)
