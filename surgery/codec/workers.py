"""Threads for the layers of a model, and the layers' second moments, ready for rounding, within a limit of memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from surgery.codec.feedback import Curvature
from surgery.codec.layer import Factors
from surgery.system.threads import one_thread

__all__ = ["Metric", "Moment", "Workers"]

Moment = torch.Tensor | None
# By layer, C (in, in) of the inputs and F (out, out) of the gradients at the output; None is the identity.
Metric = Callable[[int], tuple[Moment, Moment]]

# Bytes of moments that are kept from one pass to the next, and of others that are worked on at a time.
KEPT, AT_WORK = 1 << 29, 1 << 29
MOST, MOST_WITH_MOMENTS = 8, 2  # workers
CURVE_BYTES = 12  # of a number of a moment: float64, and its triangle in float32

Item = TypeVar("Item")
Value = TypeVar("Value")


class Workers:
    """Threads, and the layers' moments ready for use in them.

    Args:
        layers: of all the model.
        metric: their moments.
        damping: of them.
    """

    def __init__(self, layers: Sequence[Factors], metric: Metric | None, damping: float) -> None:
        self.layers, self.damping = layers, damping
        self.metric: Metric = metric or (lambda index: (None, None))
        self._lock = threading.Lock()
        self._kept: dict[int, tuple[Curvature, Curvature]] = {}
        self._room = KEPT
        has_moments = bool(layers) and any(moment is not None for moment in self.metric(0))
        self._sizes = [CURVE_BYTES * (A.shape[1] ** 2 + B.shape[0] ** 2) if has_moments else 0 for B, A in layers]
        # Rows are taken one by one, which no second thread makes faster; what moments are made ready by, one does.
        fit = min(AT_WORK // max(*self._sizes, 1), MOST_WITH_MOMENTS) if has_moments else MOST
        self.count = max(min(torch.get_num_threads(), fit), 1)
        self._stack = contextlib.ExitStack()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        # One worker is left the threads of the linear algebra: its matrices are large, or there are none to leave.
        if self.count > 1:
            self._stack.enter_context(one_thread())
            pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
            self._pool = self._stack.enter_context(pool)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)  # after a failure nobody asks for the rest
        self._stack.close()

    def map(self, function: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Value]:
        """`function` of every item, in order."""
        if self._pool is None or len(items) == 1:
            return map(function, items)
        return self._pool.map(function, items)

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Layers to work on side by side: as many as the memory allows, each alone where it has no moments."""
        groups: list[list[int]] = []
        share, room = AT_WORK // MOST_WITH_MOMENTS, 0
        for index in indices:
            if not groups or not 0 < self._sizes[index] <= room:
                groups.append([])
                room = share
            groups[-1].append(index)
            room -= self._sizes[index]
        return groups

    def curvatures(self, index: int) -> tuple[Curvature, Curvature]:
        """Of a layer's inputs, and of its outputs."""
        found = self._kept.get(index)
        if found is not None:
            return found
        B, A = self.layers[index]
        with self._lock:
            C, F = self.metric(index)
        made = Curvature(C, A.shape[1], self.damping), Curvature(F, B.shape[0], self.damping)
        size = made[0].nbytes + made[1].nbytes
        with self._lock:
            if size <= self._room and index not in self._kept:
                self._kept[index] = made
                self._room -= size
        return made
