"""Large symmetric matrices, worked on in place.

The matrices of the joint decomposition are as large as a layer is wide, squared, in float64: every temporary copy
counts. On the CPU the routines of BLAS and LAPACK are called through scipy, which can overwrite their arguments and
use half the operations on one triangle; on a GPU torch's are used. A C-ordered tensor and its transpose share their
memory, so `tensor.numpy().T` is the Fortran-ordered view that the routines want.

Convention: of a symmetric matrix only the lower triangle (of the torch tensor) need be valid on entry, and only it is
valid afterwards, unless a function says otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.linalg import blas, eigh, lapack

__all__ = [
    "Widener",
    "add_gram_",
    "cholesky_",
    "eigh_",
    "fill_upper_",
    "spd_inverse_",
    "triangular_product",
    "triangular_solve",
]


class Widener:
    """Copies matrices to float64, into one buffer that all of them share: each is valid until the next."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.float64)

    def __call__(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix`, of any floating dtype and memory order, as a contiguous float64 matrix on its device."""
        if self._buffer.numel() < matrix.numel() or self._buffer.device != matrix.device:
            self._buffer = torch.empty(matrix.numel(), dtype=torch.float64, device=matrix.device)
        return self._buffer[: matrix.numel()].view(matrix.shape).copy_(matrix)


def add_gram_(total: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """`total += W^T W`; `total (n, n)` and `wide = W (out, n)`, float64 on one device."""
    if _on_cpu(total):
        # Either memory order will do: what is Fortran-ordered already goes in as its own transpose.
        in_place = wide.T.is_contiguous()
        a = wide.numpy() if in_place else _fortran(wide.contiguous())
        blas.dsyrk(1.0, a, beta=1.0, c=_fortran(total), trans=int(in_place), lower=0, overwrite_c=1)
    else:
        total.addmm_(wide.T, wide)
    return total


def cholesky_(matrix: torch.Tensor) -> bool:
    """Replace `matrix` by its Cholesky factor `L` (lower; `matrix = L L^T`, `R = L^T`), zeros above it.

    Returns:
        Whether the matrix was positive definite; if not, its content is lost.
    """
    if _on_cpu(matrix):
        _, info = lapack.dpotrf(_fortran(matrix), lower=0, clean=1, overwrite_a=1)
        return bool(info == 0)
    factor, info = torch.linalg.cholesky_ex(fill_upper_(matrix))
    matrix.copy_(factor)
    return bool(int(info) == 0)


def spd_inverse_(matrix: torch.Tensor) -> torch.Tensor:
    """Replace a symmetric positive definite matrix by its inverse.

    Raises:
        ValueError: it is not positive definite.
    """
    if not cholesky_(matrix):
        raise ValueError("the matrix is not positive definite")
    if _on_cpu(matrix):
        lapack.dpotri(_fortran(matrix), lower=0, overwrite_c=1)
        return matrix
    return matrix.copy_(torch.cholesky_inverse(matrix))


def fill_upper_(matrix: torch.Tensor) -> torch.Tensor:
    """Make both triangles valid, in place, a block of rows at a time."""
    size = matrix.shape[0]
    for start in range(0, size, 512):
        stop = min(start + 512, size)
        block = matrix[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).T)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
    return matrix


def triangular_product(L: torch.Tensor, matrix: torch.Tensor, transposed: bool) -> torch.Tensor:
    """`L^T M` (`transposed`) or `L M` for a lower triangular `L (n, n)`; `matrix (n, k)` may be overwritten."""
    if not _on_cpu(L):
        return L.T @ matrix if transposed else L @ matrix
    # In Fortran's view L is the upper factor L^T.
    b = _fortran_columns(matrix)
    result = blas.dtrmm(1.0, _fortran(L), b, lower=0, trans_a=0 if transposed else 1, overwrite_b=1)
    return torch.from_numpy(result)


def triangular_solve(L: torch.Tensor, matrix: torch.Tensor, transposed: bool, overwrite: bool = False) -> torch.Tensor:
    """`L^-T M` (`transposed`) or `L^-1 M` for a lower triangular `L (n, n)`.

    `matrix (n, k)` may be overwritten if `overwrite` is set, and is kept otherwise.
    """
    if not _on_cpu(L):
        return torch.linalg.solve_triangular(L.T if transposed else L, matrix, upper=transposed)
    b = _fortran_columns(matrix)
    trans = 0 if transposed else 1
    return torch.from_numpy(blas.dtrsm(1.0, _fortran(L), b, lower=0, trans_a=trans, overwrite_b=int(overwrite)))


def eigh_(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues `(n,)` in rising order and eigenvectors `(n, n)`, as columns; the matrix is overwritten."""
    if not _on_cpu(matrix):
        values, vectors = torch.linalg.eigh(fill_upper_(matrix))
        return values, vectors
    values, vectors = eigh(_fortran(matrix), lower=False, overwrite_a=True, driver="evd", check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _fortran(tensor: torch.Tensor) -> Any:
    """The same memory, transposed and Fortran-ordered."""
    return tensor.numpy().T


def _fortran_columns(tensor: torch.Tensor) -> Any:
    """The tensor itself, Fortran-ordered; a copy only where its memory is C-ordered."""
    return tensor.numpy() if tensor.T.is_contiguous() else tensor.T.contiguous().numpy().T
