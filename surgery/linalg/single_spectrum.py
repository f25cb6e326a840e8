"""Eigenvectors of a large Gram matrix in float32, accurate enough to rank the whole spectrum.

float32 errs by its precision times the largest eigenvalue, whatever eigenvalue a vector belongs to: a few outliers,
which weights of trained models have, would drown all the others. So the outliers are found first, in float64 by
a block Krylov iteration, and moved down to just above the rest of the spectrum, with their vectors as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from surgery.linalg.low_rank import orthonormal_to
from surgery.linalg.symmetric import fill_upper_

__all__ = ["single_spectrum"]

BLOCK = 12  # columns of a block of the Krylov basis
LOOKS = (3, 6, 10)  # blocks after which it is asked whether all outliers are found
EVEN = 16.0  # an outlier is larger than this many times the mean of all that are smaller
STEEP = 32.0  # float32 is not tried where what is no outlier goes beyond this many times its mean
EPSILON = torch.finfo(torch.float32).eps
SAME = 4.0  # in steps of float32: eigenvalues that it cannot tell apart
CROWD = 4  # so many of them next to each other are a degenerate eigenvalue


class Outliers(NamedTuple):
    """The largest eigenvalues `(k,)`, falling, and their vectors `(n, k)`; of all others the largest, and the mean."""

    values: torch.Tensor
    vectors: torch.Tensor
    rest: float
    mean: float


def single_spectrum(gram: torch.Tensor) -> torch.Tensor | None:
    """Return the eigenvectors of a Gram matrix as columns, by rising eigenvalue, `(n, n)` float32.

    Args:
        gram: `(n, n)` float64, of which the lower triangle is valid; both triangles are afterwards.

    Returns:
        None where float32 is not accurate enough: too many outliers, or a degenerate eigenvalue other than zero.
    """
    size = gram.shape[0]
    found = _outliers(fill_upper_(gram))
    if not found.rest < STEEP * found.mean:
        return None
    count = found.values.numel()
    # Apart from each other and from the rest, so that float32 mixes none of them.
    places = found.rest * torch.linspace(3, 2, count, dtype=torch.float64, device=gram.device)
    moved = torch.addmm(gram, found.vectors * (places - found.values), found.vectors.T).float()
    values, vectors = torch.linalg.eigh(moved)
    if _degenerate(values[: size - count]):
        return None
    vectors[:, size - count :] = found.vectors.flip(1)
    return vectors


def _outliers(gram: torch.Tensor) -> Outliers:
    """The outliers, as far as a block Krylov iteration finds them to float32's precision."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gram.shape[0], BLOCK, generator=generator, dtype=torch.float64).to(gram.device)
    basis = torch.linalg.qr(gram @ start).Q
    products = gram @ basis
    for blocks in range(2, LOOKS[-1] + 1):
        newest = orthonormal_to(basis, products[:, -BLOCK:])
        basis, products = torch.cat([basis, newest], 1), torch.cat([products, gram @ newest], 1)
        if blocks not in LOOKS:
            continue
        values, turn = torch.linalg.eigh(basis.T @ products)
        values, turn = values.flip(0), turn.flip(1)
        means = _mean_of_rest(gram, values)
        large = int((values > EVEN * means).cumprod(0).sum())
        vectors = basis @ turn[:, :large]
        misses = (products @ turn[:, :large] - vectors * values[:large]).norm(dim=0)
        right = int((misses <= EPSILON * means[:large]).cumprod(0).sum())
        if right == large:
            break
    right = min(right, values.numel() - 1)
    return Outliers(values[:right], vectors[:, :right], float(values[right]), float(means[right]))


def _mean_of_rest(gram: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The mean of the eigenvalues from each of these on, these being the largest, falling."""
    before = values.cumsum(0) - values
    count = gram.shape[0] - torch.arange(values.numel(), device=values.device)
    return (gram.diagonal().sum() - before).clamp_min(0) / count


def _degenerate(values: torch.Tensor) -> bool:
    """Whether some of these rising eigenvalues, all but those next to zero, are the same to float32."""
    largest = float(values[-1])
    same = (values.diff() <= SAME * EPSILON * largest) & (values[1:] > values.numel() * EPSILON * largest)
    runs = same.unfold(0, CROWD - 1, 1).all(1)
    return bool(runs.any())
