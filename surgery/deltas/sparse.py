"""Products with a sparse square matrix `S (n, n)` of few entries, differentiable in the entries.

Where the library has no sparse product (half precision, a CPU without MKL), or S is not that sparse, S is scattered
into a dense matrix that lives only inside the call: keeping it for the backward pass would cost a layer's memory.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

__all__ = ["Pattern", "sampled_outer", "sparse_product"]

# Share of entries from which the dense product is as fast.
DENSE_FROM = 0.05


class Pattern(NamedTuple):
    """Where the entries of S are, row by row.

    Attributes:
        starts: where each row begins, int64 `(n + 1,)`.
        columns: int64 `(nnz,)`.
    """

    starts: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, positions: torch.Tensor, size: int) -> Pattern:
        """From ascending positions `row * size + column`, int64 `(nnz,)`."""
        rows = torch.div(positions, size, rounding_mode="floor")
        starts = torch.searchsorted(rows, torch.arange(size + 1, device=positions.device))
        return cls(starts, positions - rows * size)

    def rows(self) -> torch.Tensor:
        """Int64 `(nnz,)`."""
        counted = torch.arange(self.starts.numel() - 1, device=self.starts.device)
        return torch.repeat_interleave(counted, self.starts.diff(), output_size=self.columns.numel())

    def positions(self) -> torch.Tensor:
        """`row * size + column`, ascending."""
        return self.rows() * (self.starts.numel() - 1) + self.columns


def sparse_product(pattern: Pattern, values: torch.Tensor, x: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """`S x`, or `S^T x`, in x's dtype.

    Args:
        pattern: where the entries are.
        values: the entries, `(nnz,)`.
        x: `(n, k)`.
        transposed: multiply by `S^T`.
    """
    size, values = x.shape[0], values.to(x.dtype)
    if not _has_kernels(x, pattern):
        dense = torch.zeros(size * size, dtype=x.dtype, device=x.device)
        dense = dense.scatter_add_(0, pattern.positions(), values).reshape(size, size)
        return (dense.T if transposed else dense) @ x
    S = _compressed(pattern, values)
    product: torch.Tensor = torch.sparse.mm(S.t() if transposed else S, x)
    return product


def sampled_outer(pattern: Pattern, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The entries of `u x^T (n, n)` at the places of S, `(nnz,)`, for `u` and `x` of `(n, k)`."""
    if not _has_kernels(u, pattern):
        return (u @ x.T).flatten()[pattern.positions()]
    zeros = torch.zeros(pattern.columns.shape, dtype=u.dtype, device=u.device)
    sampled = torch.sparse.sampled_addmm(_compressed(pattern, zeros), u, x.T, beta=0.0)
    entries: torch.Tensor = sampled.values()
    return entries


def _compressed(pattern: Pattern, values: torch.Tensor) -> torch.Tensor:
    size = pattern.starts.numel() - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*pattern, values, (size, size), check_invariants=False)


def _has_kernels(x: torch.Tensor, pattern: Pattern) -> bool:
    """Whether there are sparse products for operands like `x (n, k)`, and they pay."""
    entries = pattern.columns.numel()
    if x.dtype not in {torch.float32, torch.float64} or not 0 < entries <= DENSE_FROM * x.shape[0] ** 2:
        return False
    return x.is_cuda or (x.device.type == "cpu" and torch.backends.mkl.is_available())
