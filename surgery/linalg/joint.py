"""The joint decomposition of several matrices that share a right basis (FRoD).

For `W_1 .. W_L`, all `(out_i, n)`: `W_i = U_i diag(l_i) V^T` with unit columns in every `U_i` and one `V (n, n)` for
all, the higher-order generalised singular value decomposition. With `C_i = W_i^T W_i`, `C = sum C_i = R^T R` and
`T = R mean_i[(C_i + a C)^-1] R^T = Z diag(t) Z^T`, it is `V = R^T Z`.

Only `n x n` matrices are held, however many layers there are: the matrices are visited one at a time, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

__all__ = ["gram_matrices", "joint_basis", "left_norms", "right_inverse_transposed"]

# Squaring in float64 leaves directions below 1e-8 of the largest singular value to rounding.
RANK_TOLERANCE = 1e-14


def gram_matrices(weights: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """`W^T W` in float64, `(n, n)`, for each `W (out, n)`, on its device."""
    for weight in weights:
        wide = weight.to(torch.float64)
        yield wide.T @ wide


def joint_basis(
    grams: Callable[[], Iterable[torch.Tensor]], total_rows: int, regularization: float = 1e-3
) -> torch.Tensor:
    """The shared right basis of a category of weights.

    Follows FRoD (doi 10.1609/aaai.v40i31.39813) with one matrix at a time. Where the stacked weights have fewer
    rows than columns, the basis is their full right singular basis, as in the reference. Where they are
    rank-deficient, the basis of their row space is completed by an orthonormal basis of the rest, so that it can
    always be inverted; no weight has a part there.

    Args:
        grams: called twice; each call visits `C_i = W_i^T W_i`, float64 `(n, n)`, in the same order.
        total_rows: number of rows of all the weights stacked.
        regularization: `a`, the ridge that keeps the inverses stable when layers are alike.

    Returns:
        `V (n, n)`, float64, columns in rising order of the eigenvalues, each with its largest entry positive.
    """
    total, count = None, 0
    for gram in grams():
        total = gram.clone() if total is None else total.add_(gram)
        count += 1
    if total is None:
        raise ValueError("a joint decomposition needs at least one matrix")
    if total_rows < total.shape[0]:
        return canonical_columns(torch.linalg.eigh(total)[1].flip(1))
    if count == 1:
        return canonical_columns(_single_basis(total))
    R, info = torch.linalg.cholesky_ex(total, upper=True)
    pivots = R.diagonal()
    if int(info) == 0 and float(pivots.min()) > 1e-7 * float(pivots.max()):
        return canonical_columns(R.T @ _eigenvectors(grams, R, total, count, regularization))
    return canonical_columns(_deficient_basis(grams, total, count, regularization))


def right_inverse_transposed(V: torch.Tensor) -> torch.Tensor:
    """`V^-T`, computed in float64 and returned in the dtype of `V (n, n)`."""
    return torch.linalg.inv(V.to(torch.float64)).T.contiguous().to(V.dtype)


def left_norms(weight: torch.Tensor, V_inverse_transposed: torch.Tensor) -> torch.Tensor:
    """`l`, the column norms of `W V^-T`: so that `W = U diag(l) V^T` with unit columns in `U`.

    Args:
        weight: `(out, n)`.
        V_inverse_transposed: `(n, n)`, same device.

    Returns:
        `(n,)`, float32.
    """
    product = weight.to(V_inverse_transposed.dtype) @ V_inverse_transposed
    return torch.linalg.vector_norm(product, dim=0).to(torch.float32)


def canonical_columns(basis: torch.Tensor) -> torch.Tensor:
    """Fix the free signs: the largest entry of every column positive."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0).to(basis)


def _eigenvectors(
    grams: Callable[[], Iterable[torch.Tensor]], R: torch.Tensor, total: torch.Tensor, count: int, a: float
) -> torch.Tensor:
    """`Z`, the eigenvectors of `T`, for an invertible Cholesky factor `R` (upper) of `total`."""
    inverses = torch.zeros_like(total)
    for gram in grams():
        factor = torch.linalg.cholesky(gram.add(total, alpha=a))
        inverses += torch.cholesky_inverse(factor)
    T = R @ (inverses / count) @ R.T
    return torch.linalg.eigh((T + T.T) / 2)[1]


def _single_basis(total: torch.Tensor) -> torch.Tensor:
    """One matrix alone: `T` is a multiple of the identity, any `Z` will do; its own right singular basis is taken."""
    eigenvalues, E = torch.linalg.eigh(total)
    scale = eigenvalues.clamp_min(0).sqrt()
    # Directions without energy get unit length: the basis must stay invertible.
    return (E * torch.where(eigenvalues > RANK_TOLERANCE * eigenvalues[-1].clamp_min(1e-300), scale, 1.0)).flip(1)


def _deficient_basis(
    grams: Callable[[], Iterable[torch.Tensor]], total: torch.Tensor, count: int, a: float
) -> torch.Tensor:
    eigenvalues, E = torch.linalg.eigh(total)
    kept = eigenvalues > RANK_TOLERANCE * total.shape[0] * eigenvalues[-1]
    E_kept, root = E[:, kept], eigenvalues[kept].sqrt()
    identity = torch.eye(E_kept.shape[1], dtype=total.dtype, device=total.device)
    mean = torch.zeros_like(identity)
    for gram in grams():
        whitened = (E_kept.T @ gram @ E_kept) / (root[:, None] * root)
        mean += torch.linalg.inv((whitened + whitened.T) / 2 + a * identity)
    Z = torch.linalg.eigh((mean + mean.T) / (2 * count))[1]
    return torch.cat([(E_kept * root) @ Z, E[:, ~kept]], 1)
