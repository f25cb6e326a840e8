"""The best `sum_k M_k * (B_k A_k)` for a weight change, by alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["MaskedFit", "fit_masked"]

SWEEPS = 20
WORTHWHILE = 1e-4
# Of the mean of a row's own system and of all rows': where the masks vanish, nothing is to be gained by large factors.
RIDGE = 1e-6
BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class MaskedFit:
    """The factors, float64.

    Attributes:
        B: `(out, r)`, the groups side by side.
        A: `(r, in)`.
        relative_error: in the weighted norm.
        errors: the same after each sweep.
    """

    B: torch.Tensor
    A: torch.Tensor
    relative_error: float
    errors: Sequence[float]


def fit_masked(
    target: torch.Tensor, masks: Sequence[torch.Tensor], start: Sequence[torch.Tensor], weights: torch.Tensor | None
) -> MaskedFit:
    """Fit factors to a matrix through masks: `||(target - sum_k M_k * (B_k A_k)) diag(w)^(1/2)||` as small as may be.

    Given A, each row of B solves an r x r system of its own; given B, each column of A. Each step can only lower the
    error, up to a small ridge.

    Args:
        target: `(out, in)`.
        masks: K matrices `(out, in)`.
        start: `A_k (r_k, in)`.
        weights: `w (in,)`, not negative; None for ones.
    """
    root = torch.ones_like(target[0], dtype=torch.float64) if weights is None else weights.double().clamp_min(0).sqrt()
    wide, scaled = target.double() * root, [mask.double() * root for mask in masks]
    energy = float(wide.square().sum())
    ranks = [each.shape[0] for each in start]
    A = torch.cat([each.double().T for each in start], 1)  # (in, r)
    B = torch.zeros(target.shape[0], sum(ranks), dtype=torch.float64, device=target.device)
    if energy == 0:
        return MaskedFit(B, A.T.contiguous(), 0.0, [0.0])
    turned, turned_wide = [mask.T.contiguous() for mask in scaled], wide.T.contiguous()
    errors: list[float] = []
    for _ in range(SWEEPS):
        B = _rows(wide, scaled, A, ranks)
        A = _rows(turned_wide, turned, B, ranks)
        left = wide.clone()
        for mask, part_B, part_A in zip(scaled, B.split(ranks, 1), A.split(ranks, 1), strict=True):
            left -= mask * (part_B @ part_A.T)
        errors.append(math.sqrt(float(left.square().sum()) / energy))
        if len(errors) > 1 and errors[-2] ** 2 - errors[-1] ** 2 < WORTHWHILE:
            break
    return MaskedFit(B, A.T.contiguous(), errors[-1], errors)


def _rows(
    target: torch.Tensor, masks: Sequence[torch.Tensor], other: torch.Tensor, ranks: Sequence[int]
) -> torch.Tensor:
    """For each row t of `target (m, n)` the x `(r,)` that minimises `|t - sum_k m_k * (x_k other_k^T)|`: `(m, r)`."""
    rank = other.shape[1]
    batch = max(1, BATCH_BYTES // (8 * rank * target.shape[1]))
    parts = other.split(list(ranks), 1)
    systems, sides = [], []
    for start in range(0, target.shape[0], batch):
        rows = slice(start, start + batch)
        design = torch.cat([mask[rows, :, None] * part for mask, part in zip(masks, parts, strict=True)], 2)
        systems.append(design.mT @ design)  # (batch, r, r)
        sides.append(design.mT @ target[rows, :, None])
    system, side = torch.cat(systems), torch.cat(sides)
    own = system.diagonal(dim1=1, dim2=2).mean(1)
    ridge = RIDGE * (own + own.mean()) + torch.finfo(torch.float64).tiny
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return torch.linalg.solve(system, side)[:, :, 0]
