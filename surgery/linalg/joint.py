"""The joint decomposition of several matrices that share a right basis (FRoD).

For `W_1 .. W_L`, all `(out_i, n)`: `W_i = U_i diag(l_i) V^T` with unit columns in every `U_i` and one `V (n, n)` for
all, the higher-order generalised singular value decomposition. With `C_i = W_i^T W_i`, `C = sum C_i = R^T R` and
`T = R mean_i[(C_i + a C)^-1] R^T = Z diag(t) Z^T`, it is `V = R^T Z`.

Only a few `n x n` matrices are held, however many layers there are: the weights are visited one at a time, twice.
Squaring the weights costs half the digits, so all of it is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from surgery.linalg.symmetric import (
    Widener,
    add_gram_,
    cholesky_,
    eigh_,
    fill_upper_,
    spd_inverse_,
    triangular_product,
    triangular_solve,
)
from surgery.system.threads import one_thread, one_torch_thread

__all__ = ["JointBasis", "joint_basis", "left_norms", "right_inverse_transposed"]

# In float64, squaring leaves directions below 1e-8 of the largest singular value to rounding.
RANK_TOLERANCE = 1e-14
PIVOT_TOLERANCE = 1e-7
# Below this width one thread is faster than several.
SMALL = 768

# Gram matrices kept from the first visit of the weights to the second, in bytes: a fixed allowance, so that memory does
# not grow with depth.
KEPT_BYTES = 64 * 2**20

# Visits the weights (out, n) from the given one on, one at a time, in the same order at every call.
Weights = Callable[[int], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class JointBasis:
    """The shared right basis of a category of weights.

    Attributes:
        V: `(n, n)`, float64, columns in rising order of the eigenvalues, the largest entry of each positive.
        inverse_transposed: `V^-T (n, n)`, float64.
        fallback: why the Cholesky factor was not used (`single matrix`, `few rows`, `rank-deficient`), or None.
    """

    V: torch.Tensor
    inverse_transposed: torch.Tensor
    fallback: str | None = None


def joint_basis(weights: Weights, columns: int, regularization: float = 1e-3) -> JointBasis:
    """Decompose the weights of one category jointly.

    Follows FRoD (doi 10.1609/aaai.v40i31.39813), with Gram matrices in place of the stacked weights' QR. Where the
    stack has fewer rows than columns, the basis is its full right singular basis, as in the reference. Where the stack
    is rank-deficient, the basis of its row space is completed by an orthonormal basis of the rest, so that it can
    always be inverted; no weight has a part there. A weight alone gets its own right singular basis: every basis
    satisfies the definition there.

    Args:
        weights: called twice or more, with the number of weights to leave out at the beginning.
        columns: n.
        regularization: `a`, the ridge that keeps the inverses stable when layers are alike.

    Raises:
        ValueError: there are no weights.
    """
    with one_thread() if columns < SMALL else one_torch_thread():
        return _joint_basis(weights, columns, regularization)


def _joint_basis(weights: Weights, columns: int, regularization: float) -> JointBasis:
    total, heights, grams = _sum_of_grams(weights, columns)
    if sum(heights) < columns:
        return _with_inverse(_row_space_basis(total, scaled=False), "few rows")
    if len(heights) == 1:
        return _with_inverse(_row_space_basis(total, scaled=True), "single matrix")
    L = total.clone()
    if not cholesky_(L) or float(L.diagonal().min()) <= PIVOT_TOLERANCE * float(L.diagonal().max()):
        del L
        return _with_inverse(_deficient_basis(weights, total, len(heights), regularization), "rank-deficient")
    if _favours_wide(max(heights), columns):
        grams.clear()
        T = _rotated_by_wide(weights, L, total, len(heights), regularization)
    else:
        T = _rotated_by_tall(weights, L, total, grams, len(heights), regularization)
    Z = eigh_(T)[1]
    inverse_transposed = triangular_solve(L, Z, transposed=True)  # V^-T = R^-1 Z, because Z is orthogonal
    V = triangular_product(L, Z, transposed=False)
    sign = _column_signs(V)
    return JointBasis(V.mul_(sign), inverse_transposed.mul_(sign))


def right_inverse_transposed(V: torch.Tensor) -> torch.Tensor:
    """`V^-T`, computed in float64 and returned in the dtype of `V (n, n)`."""
    return torch.linalg.inv(V.to(torch.float64)).T.contiguous().to(V.dtype)


def left_norms(weight: torch.Tensor, V_inverse_transposed: torch.Tensor) -> torch.Tensor:
    """`l`, the column norms of `W V^-T`: so that `W = U diag(l) V^T` with unit columns in `U`.

    Args:
        weight: `(out, n)`.
        V_inverse_transposed: `(n, n)`, same device; its dtype is computed in.

    Returns:
        `(n,)`, float32.
    """
    # Transposed, so that each norm is over memory in a row.
    product = V_inverse_transposed.T @ weight.to(V_inverse_transposed.dtype).T  # (n, out)
    return torch.linalg.vector_norm(product, dim=1).to(torch.float32)


def _sum_of_grams(weights: Weights, columns: int) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
    """`C` (lower triangle), the number of rows of each weight, and the first few Gram matrices."""
    total, heights, widen = None, [], Widener()
    grams: list[torch.Tensor] = []
    for weight in weights(0):
        if total is None:
            total = torch.zeros(columns, columns, dtype=torch.float64, device=weight.device)
        if (len(grams) + 1) * total.nbytes <= KEPT_BYTES:
            grams.append(add_gram_(torch.zeros_like(total), widen(weight)))
            total += grams[-1]
        else:
            add_gram_(total, widen(weight))
        heights.append(weight.shape[0])
    if total is None:
        raise ValueError("a joint decomposition needs at least one matrix")
    return total, heights, grams


def _favours_wide(m: int, n: int) -> bool:
    """Whether the small inverses cost fewer operations than the large ones, for weights `(m, n)`."""
    return 2 * m * n**2 + 2 * m**2 * n + m**3 / 3 < m * n**2 + n**3


def _rotated_by_tall(
    weights: Weights, L: torch.Tensor, total: torch.Tensor, grams: list[torch.Tensor], count: int, a: float
) -> torch.Tensor:
    """`T` by one `n x n` inverse for each weight; `total` is overwritten and returned, `grams` are used up."""
    mean = torch.zeros_like(total)
    kept = len(grams)
    while grams:
        mean += spd_inverse_(grams.pop(0).add_(total, alpha=a))
    shifted, widen = torch.empty_like(total), Widener()
    for weight in weights(kept):
        shifted.copy_(total).mul_(a)
        mean += spd_inverse_(add_gram_(shifted, widen(weight)))
    del shifted
    # T = R X R^T: the product is formed as (R (R X)^T)^T, and T is symmetric.
    half = triangular_product(L, fill_upper_(mean).div_(count), transposed=True)
    del mean
    return total.copy_(triangular_product(L, half.T, transposed=True))


def _rotated_by_wide(weights: Weights, L: torch.Tensor, total: torch.Tensor, count: int, a: float) -> torch.Tensor:
    """`T` for weights with few rows, by inverses of that size; `total` is overwritten and returned.

    With `Y = W R^-1`, `(Y^T Y + a I)^-1 = (I - Y^T (a I + Y Y^T)^-1 Y) / a` (Woodbury).
    """
    total.zero_()
    widen = Widener()
    for weight in weights(0):
        Y = triangular_solve(L, widen(weight).T, transposed=False, overwrite=True).T  # (m, n)
        inner = torch.zeros(Y.shape[0], Y.shape[0], dtype=Y.dtype, device=Y.device)
        inner.diagonal().fill_(a)
        if not cholesky_(add_gram_(inner, Y.T)):
            raise ValueError("the regularised Gram matrix of a weight is not positive definite")
        # Y^T (G G^T)^-1 Y = (G^-1 Y)^T (G^-1 Y)
        add_gram_(total, triangular_solve(inner, Y, transposed=False))
    total.mul_(-1 / (a * count))
    total.diagonal().add_(1 / a)
    return total


def _row_space_basis(total: torch.Tensor, scaled: bool) -> torch.Tensor:
    """The right singular vectors of the stack by falling singular value, times these if `scaled`, and completed."""
    E, root = _row_space(total)
    return torch.cat([E * root if scaled else E, _complement(E)], 1)


def _deficient_basis(weights: Weights, total: torch.Tensor, count: int, a: float) -> torch.Tensor:
    E, root = _row_space(total)
    identity = torch.eye(E.shape[1], dtype=total.dtype, device=total.device)
    mean = torch.zeros_like(identity)
    for weight in weights(0):
        whitened = (weight.to(torch.float64) @ E) / root
        mean += torch.linalg.inv(whitened.T @ whitened + a * identity)
    Z = torch.linalg.eigh((mean + mean.T) / (2 * count))[1]
    return torch.cat([(E * root) @ Z, _complement(E)], 1)


def _row_space(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Right singular vectors `(n, k)` and values `(k,)` of the stack, falling, without those that are rounding."""
    eigenvalues, E = eigh_(total)
    kept = int((eigenvalues > RANK_TOLERANCE * total.shape[0] * eigenvalues[-1]).sum())
    last = total.shape[0] - kept
    return E[:, last:].flip(1), eigenvalues[last:].flip(0).sqrt()


def _complement(E: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what `E (n, k)` leaves out, the same on every machine up to rounding.

    Any basis would complete V, but entries of S act through it; so it is that of seeded random vectors projected onto
    the complement, in which nothing is left to chance.
    """
    size, kept = E.shape
    generator = torch.Generator(device="cpu").manual_seed(0)
    random = torch.randn(size, size - kept, generator=generator, dtype=torch.float64).to(E.device)
    for _ in range(2):  # twice is enough to be orthogonal to rounding
        random = random - E @ (E.T @ random)
    Q, R = torch.linalg.qr(random)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def _with_inverse(V: torch.Tensor, fallback: str) -> JointBasis:
    V = V * _column_signs(V)
    return JointBasis(V, right_inverse_transposed(V), fallback)


def _column_signs(basis: torch.Tensor) -> torch.Tensor:
    """What makes the largest entry of every column positive, `(1, n)`."""
    # From the extremes of each column, without a copy of absolute values.
    highest, lowest = basis.max(0, keepdim=True).values, basis.min(0, keepdim=True).values
    return torch.where(highest >= -lowest, 1.0, -1.0).to(basis)
