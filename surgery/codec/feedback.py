"""Rounding the columns of a factor to integers, where errors can make up for each other and bits have a price.

Of columns T the integers Z are sought that make `sum_k w_k |T_k - Z_k|_H^2 + price * bits(Z)` small, where H is a
second moment. As in GPTQ (arXiv 2210.17323) rows are fixed one after the other, and each row aims at what is best
given the errors of the rows before: with `H = R^T D R`, R of unit diagonal, taken from the last row up, its target is
`T_i + sum_j>i R_ij (T - Z)_j` and what remains of its error counts `D_i`. Rows with a large diagonal go first, which
makes the `D_i` almost equal, as one step for all rows wants it.

Rows depend on each other, layers do not: those of one height are taken through the rows side by side, and their
columns together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Curvature", "Integers", "Rounding", "RoundingRule", "rounded"]

# Rows whose errors are passed on one by one, then in one product to the rest of a block, then to all other rows.
STRIP, BLOCK = 8, 128
PART = 1024
ENOUGH = 1e-4

Matrix = NDArray[np.float64] | NDArray[np.float32]
Integers = NDArray[np.float32]  # exact up to 2^24


class RoundingRule:
    """What rounding is to weigh: the nearest integer, the one below it in magnitude, or 0 if that saves enough bits.

    Args:
        weights: of the squared error of each column, in units of its step, `(r,)`.
        bits: what magnitudes cost, times the price, by magnitude and column, `(largest + 1, r)`.
    """

    def __init__(self, weights: Matrix, bits: Matrix) -> None:
        magnitudes = np.arange(1, len(bits))[:, None]
        nothing = np.full((1, len(weights)), -np.inf)
        # With errors weighed w, z is worth its bits b_z against z - 1 from z - 1/2 + (b_z - b_(z-1)) / 2w on, and
        # against 0 from z / 2 + (b_z - b_0) / 2wz on.
        below, zero = np.diff(bits, axis=0) / (2 * weights), (bits[1:] - bits[0]) / (2 * weights * magnitudes)
        self._set(np.concatenate([nothing, below]), np.concatenate([nothing, zero]), [len(bits) - 1] * len(weights))

    @classmethod
    def joined(cls, rules: Sequence[RoundingRule]) -> RoundingRule:
        """One rule for the columns of all."""
        self = cls.__new__(cls)
        height = max(len(rule.below) for rule in rules)

        def padded(table: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.pad(table, ((0, height - len(table)), (0, 0)))

        self._set(
            np.concatenate([padded(rule.below) for rule in rules], 1),
            np.concatenate([padded(rule.zero) for rule in rules], 1),
            np.concatenate([rule.largest for rule in rules]),
        )
        return self

    def _set(self, below: Matrix, zero: Matrix, largest: Sequence[float] | Integers) -> None:
        self.columns = np.arange(below.shape[1], dtype=np.int32)
        self.largest = np.array(largest, dtype=np.float32)
        self.below, self.zero = (np.ascontiguousarray(table, dtype=np.float32) for table in (below, zero))

    def nearest(self, targets: NDArray[np.float32], cheapness: float | NDArray[np.float32]) -> Integers:
        """The best integers for targets `(..., r)` in units of the steps, if bits count `cheapness` times."""
        magnitude = np.abs(targets)
        choice = np.minimum(np.rint(magnitude), self.largest)
        cell = choice.astype(np.int32)
        cell *= len(self.columns)
        cell += self.columns
        excess = magnitude - choice
        excess += 0.5
        less = excess < self.below.take(cell) * cheapness
        choice -= less
        cell -= less * np.int32(len(self.columns))
        magnitude -= choice * 0.5
        choice *= magnitude >= self.zero.take(cell) * cheapness
        return np.copysign(choice, targets)


class Curvature:
    """A second moment, made ready for rounding; or the identity.

    Args:
        moment: symmetric, positive semidefinite, `(n, n)`; None, or zero, for the identity.
        size: n.
        damping: this share of the mean of its diagonal is added to the diagonal.

    Attributes:
        size: n.
        pivot: geometric mean of what errors of a row count after those to come have made up for it.

    Raises:
        ValueError: the damped moment is not positive definite.
    """

    def __init__(self, moment: torch.Tensor | None, size: int, damping: float) -> None:
        self.size, self.pivot = size, 1.0
        self._H: torch.Tensor | None = None
        if moment is None or not bool(moment.diagonal().any()):
            return
        self._H = moment.double()  # the same tensor, if it is in float64
        self._ridge = damping * float(self._H.diagonal().mean())
        # From the last row up: the largest last.
        order = torch.argsort(self._H.diagonal())
        # In float32 where that is enough: it decides how errors are spread, not what they are.
        triangle = _triangle(moment.float(), order, self._ridge, ENOUGH)
        if triangle is None:
            triangle = _triangle(self._H, order, self._ridge, 0.0)
        if triangle is None:
            raise ValueError("a second moment is not positive definite; more damping makes it so")
        R = triangle.float().numpy()
        diagonal = R.diagonal().copy()
        R /= diagonal[:, None]
        self.order, self.R, self.pivots = order.numpy(), R, diagonal**2
        self.pivot = float(np.exp(2 * np.log(diagonal.astype(np.float64)).mean()))

    @property
    def nbytes(self) -> int:
        """What it takes in memory, the moment included."""
        return 0 if self._H is None else self._H.nbytes + self.R.nbytes

    @property
    def is_identity(self) -> bool:
        """Whether there is no moment."""
        return self._H is None

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        """The damped moment by columns `(n, k)`, float64."""
        columns = columns.double()
        return columns if self._H is None else torch.addmm(columns, self._H, columns, beta=self._ridge)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left^T H right`, float64."""
        return left.double().T @ self.times(right)


@dataclass(frozen=True)
class Rounding:
    """What is to be rounded.

    Attributes:
        curve: how errors count.
        targets: in units of the steps, `(n, r)`.
        rule: for the r columns.
    """

    curve: Curvature
    targets: NDArray[np.float32]
    rule: RoundingRule


def rounded(tasks: Sequence[Rounding]) -> list[Integers]:
    """Integers `(n, r)` for the targets of each task."""
    results: list[Integers] = [task.targets for task in tasks]
    groups: dict[int, list[int]] = {}
    for index, task in enumerate(tasks):
        if task.curve.is_identity:
            # Part by part, so that what is in between stays in the cache.
            parts = range(0, len(task.targets), PART)
            results[index] = np.concatenate([task.rule.nearest(task.targets[at : at + PART], 1.0) for at in parts])
        else:
            groups.setdefault(task.curve.size, []).append(index)
    for group in groups.values():
        for index, integers in zip(group, _side_by_side([tasks[index] for index in group]), strict=True):
            results[index] = integers
    return results


def _side_by_side(tasks: Sequence[Rounding]) -> list[Integers]:
    """The same for tasks of one height, none of them with the identity."""
    size, widths = tasks[0].curve.size, [task.targets.shape[1] for task in tasks]
    ends = np.cumsum(widths)
    columns = [slice(end - width, end) for end, width in zip(ends.tolist(), widths, strict=True)]
    triangles = [task.curve.R for task in tasks]
    owner = np.repeat(np.arange(len(tasks)), widths)
    rule = RoundingRule.joined([task.rule for task in tasks])
    cheapness = (1 / np.stack([task.curve.pivots for task in tasks], 1)).take(owner, axis=1)
    targets = np.concatenate([task.targets[task.curve.order] for task in tasks], 1)
    integers, errors = np.zeros_like(targets), np.zeros_like(targets)
    for last in range(size, 0, -BLOCK):
        first = max(last - BLOCK, 0)
        aims = targets[first:last].copy()
        if last < size:
            for R, own in zip(triangles, columns, strict=True):
                aims[:, own] += R[first:last, last:] @ errors[last:, own]
        for stop in range(last, first, -STRIP):
            start = max(stop - STRIP, first)
            strip = aims[start - first : stop - first]
            if stop < last:
                for R, own in zip(triangles, columns, strict=True):
                    strip[:, own] += R[start:stop, stop:last] @ errors[stop:last, own]
            shares = np.stack([R[start:stop, start:stop] for R in triangles], 2).take(owner, axis=2)
            for row in range(stop - start - 1, -1, -1):
                here = start + row
                integers[here] = rule.nearest(strip[row], cheapness[here])
                errors[here] = targets[here] - integers[here]
                strip[:row] += shares[:row, row] * errors[here]
    results = [np.empty_like(task.targets) for task in tasks]
    for task, own, result in zip(tasks, columns, results, strict=True):
        result[task.curve.order] = integers[:, own]
    return results


def _triangle(moment: torch.Tensor, order: torch.Tensor, ridge: float, enough: float) -> torch.Tensor | None:
    """Upper triangular, the Cholesky factor of the damped moment in this order.

    None where there is none, or where no more than a share `enough` is left of a diagonal element, and so of digits.
    """
    ordered = moment[order[:, None], order]
    ordered.diagonal().add_(ridge)
    triangle, failed = torch.linalg.cholesky_ex(ordered, upper=True)
    left = triangle.diagonal().square() > enough * ordered.diagonal()
    return triangle if not int(failed) and bool(left.all()) else None
