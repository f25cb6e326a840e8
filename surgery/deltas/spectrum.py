"""Singular values of weight changes, and how many of them hold a share of the energy."""

from __future__ import annotations

import torch

from surgery.deltas.operators import Delta, LowRank
from surgery.deltas.products import Kronecker
from surgery.linalg.low_rank import svd_of_product

__all__ = ["effective_rank", "has_cheap_spectrum", "singular_values"]


def has_cheap_spectrum(delta: Delta) -> bool:
    """Whether a change's singular values come from small matrices alone."""
    return isinstance(delta, Kronecker) or delta.factors() is not None


def singular_values(delta: Delta) -> torch.Tensor:
    """The singular values of a change, falling, float64.

    Through factors where they exist; a Kronecker product has the products of its sides' values. Only a change with
    neither is decomposed as the dense `out x in` matrix.

    Returns:
        `(k,)`, with k at most min(out, in); the values that are left out are zero.
    """
    if isinstance(delta, Kronecker):
        left, right = (_of_low_rank(side) for side in (delta.left, delta.right))
        values = (left[:, None] * right[None, :]).flatten() * abs(delta.scale)
        return values.sort(descending=True).values
    factors = delta.factors()
    if factors is None:
        return torch.linalg.svdvals(delta.dense().double())
    return _of_factors(*factors)


def effective_rank(values: torch.Tensor, share: float) -> int:
    """How many of the largest singular values hold a share of the energy, the sum of their squares.

    Args:
        values: singular values, falling.
        share: of the energy, in (0, 1].

    Returns:
        The smallest such number; 0 for values that are all zero.
    """
    energy = values.double().square()
    total = energy.sum()
    if not bool(total > 0):
        return 0
    # Rounding in the running sum must not ask for one more than there are.
    reached = energy.cumsum(0) >= share * total * (1 - 1e-12)
    return int(reached.to(torch.int64).argmax()) + 1


def _of_low_rank(matrix: LowRank) -> torch.Tensor:
    B, A = matrix.factors()
    return _of_factors(B, A)


def _of_factors(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    return svd_of_product(B.double(), A.double()).S
