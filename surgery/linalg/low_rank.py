"""Truncated singular value decompositions: of a matrix by randomised block Krylov, of a product by its factors."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from surgery.system.threads import one_torch_thread

__all__ = ["LinearMap", "TruncatedSVD", "orthonormal_to", "svd_of_map", "svd_of_product", "truncated_svd"]

OVERSAMPLING = 8
# Stop when another block adds less than this share to the energy captured so far. On real and on flat spectra what is
# then missing is about a tenth of it.
CONVERGED = 1e-4
EVERY = 2  # blocks from one look to the next: a look takes an eigendecomposition
# What is left of a column after subtracting its projection is rounding below this many units of its last place.
ROUNDING = 100
# Below this many entries one thread is faster than several.
SMALL = 1 << 20


class LinearMap(Protocol):
    """A matrix that is known by its products alone; every real tensor is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def T(self) -> LinearMap: ...

    def __matmul__(self, other: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class TruncatedSVD:
    """`U diag(S) Vh`, the leading part of a singular value decomposition.

    Attributes:
        U: `(m, r)`, orthonormal columns.
        S: `(r,)`, in falling order.
        Vh: `(r, n)`, orthonormal rows.
        energy: squared Frobenius norm of the whole matrix; NaN where it is not known.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    energy: float

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what was cut off, over that of the whole; 0 for a zero matrix."""
        kept = float(self.S.double().square().sum())
        return max(1.0 - kept / self.energy, 0.0) ** 0.5 if self.energy > 0 else 0.0

    def balanced(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors `B (m, r)` and `A (r, n)` of equal norm in every rank, `B A = U diag(S) Vh`."""
        root = self.S.clamp_min(0).sqrt()
        return self.U * root, root[:, None] * self.Vh


def truncated_svd(matrix: torch.Tensor, rank: int, seed: int = 0) -> TruncatedSVD:
    """The leading `rank` singular triplets of a matrix.

    A randomised block Krylov iteration (Musco and Musco, arXiv 1504.05477) with full reorthogonalisation, which
    stops when a further block no longer adds to the captured energy. Where the Krylov space would fill the
    smaller side anyway, the dense decomposition is taken.

    Args:
        matrix: `(m, n)`, float32 or float64, on any device.
        rank: at least 1; capped at min(m, n).
        seed: of the starting block.

    Returns:
        The decomposition, in the matrix's dtype and on its device. Signs are canonical: the largest entry of
        every row of `Vh` is positive.
    """
    small = matrix.device.type == "cpu" and matrix.numel() < SMALL
    with one_torch_thread() if small else contextlib.nullcontext():
        return _truncated_svd(matrix, rank, seed)


def _truncated_svd(matrix: torch.Tensor, rank: int, seed: int) -> TruncatedSVD:
    rows, columns = matrix.shape
    rank = min(rank, rows, columns)
    energy = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    block = rank + OVERSAMPLING
    if 3 * block >= min(rows, columns):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, Vh = _block_krylov(matrix, rank, block, seed, _gains_little, EVERY)
    return _canonical(TruncatedSVD(U[:, :rank], S[:rank], Vh[:rank], energy))


def svd_of_map(matrix: LinearMap, rank: int, seed: int = 0, missing: float = 5e-3) -> TruncatedSVD:
    """The leading `rank` singular triplets of a matrix that is given by its products with others.

    The iteration of `truncated_svd`; every block of it takes one product with the matrix and one with its transpose,
    so after each it is asked whether that was enough. Where the Krylov space would fill the smaller side, the matrix is
    formed.

    Args:
        matrix: `(m, n)`.
        rank: at least 1; capped at min(m, n).
        seed: of the starting block.
        missing: stop when about this share of the energy that `rank` triplets can capture is not captured yet.

    Returns:
        The decomposition, its `energy` NaN: products do not tell it.
    """
    rank = min(rank, *matrix.shape)
    block = rank + OVERSAMPLING
    if 3 * block >= min(matrix.shape):
        dense = matrix @ torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    else:
        U, S, Vh = _block_krylov(matrix, rank, block, seed, lambda captured: _missing(captured) <= missing)
    return _canonical(TruncatedSVD(U[:, :rank], S[:rank], Vh[:rank], math.nan))


def svd_of_product(B: torch.Tensor, A: torch.Tensor) -> TruncatedSVD:
    """The singular value decomposition of `B @ A` from its factors: two QRs and one small dense SVD.

    Args:
        B: `(m, r)`.
        A: `(r, n)`, same dtype and device.

    Returns:
        All min(m, r, n) triplets, in the factors' dtype.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return _canonical(TruncatedSVD(Q_B @ U, S, Vh @ Q_A.T, float(S.double().square().sum())))


def _gains_little(captured: Sequence[float]) -> bool:
    return len(captured) > 1 and captured[-1] - captured[-2] <= EVERY * CONVERGED * captured[-1]


def _missing(captured: Sequence[float]) -> float:
    """About what share of the energy the next blocks would add, if the gains go on falling by the same factor.

    The last step, from the basis to the triplets, gives about half a block for nothing: hence the exponent.
    """
    gains = [captured[0]] + [now - before for before, now in itertools.pairwise(captured)]
    if captured[-1] == 0 or gains[-1] <= 0:
        return 0.0
    if len(gains) == 1 or gains[-1] >= gains[-2]:
        return 1.0
    ratio = gains[-1] / gains[-2]
    return gains[-1] / captured[-1] * float(ratio**1.5) / (1 - ratio)


def _block_krylov(
    matrix: LinearMap, rank: int, block: int, seed: int, enough: Callable[[list[float]], bool], every: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(matrix.shape[1], block, generator=generator).to(matrix.device, matrix.dtype)
    Q = torch.linalg.qr(matrix @ start)[0]  # (m, k): the Krylov basis so far, a block of columns at a time
    newest = Q
    projected = (matrix.T @ newest).T  # (k, n), row for row with the basis
    captured: list[float] = []
    for blocks in itertools.count(1):
        full = Q.shape[1] + block > min(matrix.shape)
        if not full and blocks % every == 0:
            # The squared singular values of Q^T W, from its small Gram matrix.
            captured.append(float(torch.linalg.eigvalsh(projected @ projected.T)[-rank:].clamp_min(0).sum()))
        if full or (blocks % every == 0 and enough(captured)):
            break
        newest = matrix @ projected[-block:].T
        newest = orthonormal_to(Q, newest)
        Q = torch.cat([Q, newest], 1)
        projected = torch.cat([projected, (matrix.T @ newest).T])
    vectors = torch.linalg.eigh((projected @ projected.T).double())[1]
    top = vectors[:, -rank:].flip(1).to(matrix.dtype)
    # The Gram matrix says which directions; their lengths are taken from the projection itself.
    U, R = torch.linalg.qr(projected.T @ top)
    left, S, right = torch.linalg.svd(R.T)
    return Q @ (top @ left), S, right @ U.T


def orthonormal_to(Q: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of `block` without its part in the span of `Q`.

    Where nothing of a column is left but rounding, because Q already spans an invariant space, a random direction takes
    its place: what a QR decomposition puts there may lie in the span of Q.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    precision = torch.finfo(block.dtype)
    block = block / block.abs().amax(0).clamp_min(precision.tiny)  # a norm of large entries would overflow
    for attempt in range(6):
        noise = ROUNDING * precision.eps * block.norm(dim=0)
        block, R = torch.linalg.qr(block - Q @ (Q.T @ block))
        left = R.diagonal().abs()
        if attempt and float(left.min()) > 0.9:
            break
        lost = left <= noise
        if lost.any():
            drawn = torch.randn(block.shape[0], int(lost.sum()), generator=generator).to(block)
            block[:, lost] = drawn / drawn.norm(dim=0)
    return block


def _canonical(svd: TruncatedSVD) -> TruncatedSVD:
    if svd.Vh.numel() == 0:
        return svd
    largest = svd.Vh.gather(1, svd.Vh.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(svd.Vh)  # (r, 1)
    return TruncatedSVD(svd.U * sign.T, svd.S, svd.Vh * sign, svd.energy)
