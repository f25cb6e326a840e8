"""Weight changes that are products of small matrices other than `B A`: Hadamard and Kronecker products."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from surgery.deltas.operators import Delta, LowRank

__all__ = ["HadamardProduct", "Kronecker", "as_low_rank"]


class HadamardProduct(Delta):
    """`scale * (B1 A1) * (B2 A2)`, elementwise: of rank up to `r1 r2` from factors of rank r1 and r2.

    Args:
        first: `B1 A1`, `(out, in)`.
        second: `B2 A2`, of the same shape.
        scale: a number.
    """

    def __init__(self, first: LowRank, second: LowRank, scale: float = 1.0) -> None:
        if first.shape != second.shape:
            raise ValueError(f"cannot multiply matrices of shapes {first.shape} and {second.shape} elementwise")
        self.first, self.second, self.scale = first, second, scale
        self.shape = first.shape

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense())

    def dense(self) -> torch.Tensor:
        return self.first.dense() * self.second.dense() * self.scale

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        (B1, A1), (B2, A2) = self.first.factors(), self.second.factors()
        if A1.shape[0] * A2.shape[0] >= min(self.shape):
            return None
        # Entry (o, i) is sum_jk B1[o, j] B2[o, k] A1[j, i] A2[k, i]: one rank for each pair (j, k).
        B = (B1[:, :, None] * B2[:, None, :]).flatten(1)
        A = (A1[:, None, :] * A2[None, :, :]).flatten(0, 1)
        return B * self.scale, A


class Kronecker(Delta):
    """`scale * L ⊗ R`.

    Args:
        left: `L (a, b)`.
        right: `R (c, d)`; the change is `(a c, b d)`.
        scale: a number.
    """

    def __init__(self, left: LowRank, right: LowRank, scale: float = 1.0) -> None:
        self.left, self.right, self.scale = left, right, scale
        self.shape = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        grid = x.unflatten(-1, (self.left.shape[1], self.right.shape[1]))  # (..., b, d)
        rows = self.right.apply(grid)  # (..., b, c)
        return self.left.apply(rows.transpose(-1, -2)).transpose(-1, -2).flatten(-2) * self.scale

    def dense(self) -> torch.Tensor:
        return torch.kron(self.left.dense(), self.right.dense()) * self.scale

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        (B1, A1), (B2, A2) = self.left.factors(), self.right.factors()
        if A1.shape[0] * A2.shape[0] >= min(self.shape):
            return None
        return torch.kron(B1, B2) * self.scale, torch.kron(A1, A2)


def as_low_rank(matrix: torch.Tensor) -> LowRank:
    """A matrix as a product with the identity on its smaller side."""
    rows, columns = matrix.shape
    if rows <= columns:
        return LowRank(torch.eye(rows).to(matrix), matrix)
    return LowRank(matrix, torch.eye(columns).to(matrix))
