"""Rounding the columns of a factor to integers, where errors can make up for each other and bits have a price.

Of columns T the integers Z are sought that make `sum_k w_k |T_k - step_k Z_k|_H^2 + price * bits(Z)` small, where H is
a second moment. As in GPTQ (arXiv 2210.17323) rows are fixed one after the other, and each row aims at what is best
given the errors of the rows before: with `H = R^T D R`, R of unit diagonal, taken from the last row up, its target is
`T_i + sum_j>i R_ij (T - Z)_j` and what remains of its error counts `D_i`. Rows with a large diagonal go first, which
makes the `D_i` almost equal, as one step for all rows wants it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Curvature", "RoundingRule"]

BLOCK = 64
PART = 1024

Matrix = NDArray[np.float64]


class RoundingRule:
    """What rounding is to weigh: the nearest integer, the one below it in magnitude, or 0 if that saves enough bits.

    Args:
        weights: of the squared error of each column, in units of its step, `(r,)`.
        bits: what magnitudes cost, times the price, by magnitude and column, `(largest + 1, r)`.
    """

    def __init__(self, weights: Matrix, bits: Matrix) -> None:
        self.largest, self.columns = len(bits) - 1, np.arange(len(weights))
        magnitudes = np.arange(1, len(bits))[:, None]
        nothing = np.full((1, len(weights)), -np.inf)
        # With errors weighed w, z is worth its bits b_z against z - 1 from z - 1/2 + (b_z - b_(z-1)) / 2w on, and
        # against 0 from z / 2 + (b_z - b_0) / 2wz on.
        below, zero = np.diff(bits, axis=0) / (2 * weights), (bits[1:] - bits[0]) / (2 * weights * magnitudes)
        self.below = np.concatenate([nothing, below]).reshape(-1)
        self.zero = np.concatenate([nothing, zero]).reshape(-1)

    def nearest(self, targets: Matrix, pivot: float) -> Matrix:
        """The best integers for targets `(..., r)` in units of the steps, if their errors count `pivot` times."""
        magnitude = np.abs(targets)
        choice = np.minimum(np.rint(magnitude), self.largest)
        cell = (choice * len(self.columns) + self.columns).astype(np.int32)
        less = magnitude - choice + 0.5 < self.below.take(cell) / pivot
        choice -= less
        cell -= less * np.int32(len(self.columns))
        choice[magnitude - choice * 0.5 < self.zero.take(cell) / pivot] = 0
        return np.copysign(choice, targets)


class Curvature:
    """A second moment, made ready for rounding; or the identity.

    Args:
        moment: symmetric, positive semidefinite, `(n, n)`; None for the identity.
        size: n.
        damping: this share of the mean of its diagonal is added to the diagonal.

    Attributes:
        H: the damped moment, float64, or None.
        pivot: geometric mean of what errors of a row count after those to come have made up for it.
    """

    def __init__(self, moment: torch.Tensor | None, size: int, damping: float) -> None:
        self.size = size
        self.H: torch.Tensor | None = None
        self.pivot = 1.0
        if moment is None or not bool(moment.diagonal().any()):
            return
        H = moment.double().clone()
        H.diagonal().add_(damping * H.diagonal().mean())
        # From the last row up: the largest last.
        order = torch.argsort(H.diagonal())
        R = torch.linalg.cholesky(H[order][:, order], upper=True).numpy()
        diagonal = R.diagonal().copy()
        R /= diagonal[:, None]
        self.H, self._order, self._R, self._pivots = H, order.numpy(), R, diagonal**2
        self.pivot = float(np.exp(np.log(self._pivots).mean()))

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left^T H right`, float64."""
        left, right = left.double(), right.double()
        return left.T @ (right if self.H is None else self.H @ right)

    def rounded(self, targets: Matrix, rule: RoundingRule) -> Matrix:
        """Integers `(n, r)` for targets `(n, r)` in units of the steps."""
        if self.H is None:
            # Part by part, so that what is in between stays in the cache.
            parts = [rule.nearest(targets[at : at + PART], 1.0) for at in range(0, self.size, PART)]
            return np.concatenate(parts)
        targets = targets[self._order]
        integers, errors = np.zeros_like(targets), np.zeros_like(targets)
        for stop in range(self.size, 0, -BLOCK):
            start = max(stop - BLOCK, 0)
            rows = self._R[start:stop]
            aims = targets[start:stop] + rows[:, stop:] @ errors[stop:]
            for row in range(stop - start - 1, -1, -1):
                here = start + row
                aim = aims[row] + rows[row, here + 1 : stop] @ errors[here + 1 : stop]
                integers[here] = rule.nearest(aim, self._pivots[here])
                errors[here] = targets[here] - integers[here]
        result = np.empty_like(integers)
        result[self._order] = integers
        return result
