"""Spectral components of a weight: the parts of its singular value decomposition in groups of singular values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["equal_share_cuts", "spectral_component", "top_components"]


def equal_share_cuts(weight: torch.Tensor, groups: int) -> list[int]:
    """Where to cut the singular values, in falling order, into groups of equal sum.

    Args:
        weight: `(out, in)`.
        groups: K, at least 1.

    Returns:
        K - 1 rising indices: group k holds the singular values `[cut_{k-1}, cut_k)`. A cut is placed where the
        cumulative sum first reaches its share, and every group keeps at least one value where there are enough.
    """
    size = min(weight.shape)
    eigenvalues = torch.linalg.eigvalsh(_small_gram(weight))
    values = eigenvalues.flip(0).clamp_min(0).sqrt()
    share = values.cumsum(0) / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    cuts: list[int] = []
    for group in range(1, groups):
        reached = int((share < group / groups).sum()) + 1
        lowest = cuts[-1] + 1 if cuts else 1
        cuts.append(min(max(reached, lowest), max(size - (groups - group), lowest)))
    return [min(cut, size) for cut in cuts]


def top_components(weight: torch.Tensor, cuts: Sequence[int]) -> torch.Tensor:
    """The components of all groups but the last, whose component is what remains of the weight.

    Args:
        weight: `(out, in)`.
        cuts: as from `equal_share_cuts`.

    Returns:
        `(len(cuts), out, in)`, in the weight's dtype: `W V_k V_k^T`, with `V_k` the group's right singular vectors
        (or `U_k U_k^T W` where there are fewer rows than columns). Independent of singular vectors' signs.
    """
    out_features, in_features = weight.shape
    components = weight.new_empty((len(cuts), out_features, in_features))
    if not cuts:
        return components
    vectors = torch.linalg.eigh(_small_gram(weight))[1].flip(1)  # (s, s), falling singular values
    for index, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
        components[index] = spectral_component(weight, vectors[:, start:stop])
    return components


def spectral_component(weight: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Project `weight (out, in)` onto singular vectors of its smaller side, `(min(out, in), k)`."""
    wide = weight.to(vectors.dtype)
    if weight.shape[1] <= weight.shape[0]:
        return ((wide @ vectors) @ vectors.T).to(weight.dtype)
    return (vectors @ (vectors.T @ wide)).to(weight.dtype)


def _small_gram(weight: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of the smaller side, float64."""
    wide = weight.to(torch.float64)
    return wide.T @ wide if weight.shape[1] <= weight.shape[0] else wide @ wide.T
