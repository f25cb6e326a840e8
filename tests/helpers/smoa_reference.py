"""SMoA's diagonal spectral blocks as its authors define them, from a full decomposition, float64."""

from __future__ import annotations

import torch

__all__ = ["block_change", "parts_of", "score"]


def score(vectors: torch.Tensor, singular_values: torch.Tensor) -> torch.Tensor:
    """The mean spectral index of each row of `vectors (n, s)`, counted by energy; 0 for a row without any."""
    energy = vectors**2 * singular_values**2
    index = torch.arange(len(singular_values), dtype=torch.float64)
    total = energy.sum(1)
    return torch.where(total > 1e-20 * total.max(), (energy * index).sum(1) / total.clamp_min(1e-300), 0.0)


def parts_of(weight: torch.Tensor, groups: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The rows and columns of each block, in ascending order of their score."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    rows, columns = (torch.argsort(score(vectors, S), stable=True) for vectors in (U, Vh.T))
    return list(zip(torch.tensor_split(rows, groups), torch.tensor_split(columns, groups), strict=True))


def block_change(
    weight: torch.Tensor,
    parts: list[tuple[torch.Tensor, torch.Tensor]],
    factors: list[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
) -> torch.Tensor:
    """`dW`: `scale * (B_k A_k) * W_k` on each block, zero elsewhere."""
    change = torch.zeros_like(weight)
    for (rows, columns), (B, A) in zip(parts, factors, strict=True):
        # One-hot matrices, rather than indices: they select a block, and put it back.
        P, Q = torch.eye(weight.shape[0]).to(weight)[rows], torch.eye(weight.shape[1]).to(weight)[columns]
        change = change + P.T @ (scale * (B @ A) * (P @ weight @ Q.T)) @ Q
    return change
