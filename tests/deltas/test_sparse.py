"""Sparse products against dense ones, with the library's sparse kernels and without."""

from __future__ import annotations

import pytest
import torch

from surgery.deltas import sparse
from surgery.deltas.sparse import Pattern, sampled_outer, sparse_product

SIZE, COLUMNS = 40, 7


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(params=[0, 1, 60, 900], ids=lambda count: f"{count}-entries")
def positions(request) -> torch.Tensor:
    """None, one (all rows but one are empty), few, and too many for sparse kernels to pay."""
    return torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(1))[: request.param].sort().values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "none"])
def test_products_are_those_of_the_dense_matrix(positions, dtype, kernels, monkeypatch) -> None:
    if not kernels:
        monkeypatch.setattr(sparse, "_has_kernels", lambda *_: False)
    values = drawn(len(positions), dtype=dtype)
    dense = torch.zeros(SIZE * SIZE, dtype=torch.float64)
    dense[positions] = values.double()
    dense = dense.reshape(SIZE, SIZE)
    pattern = Pattern.of(positions, SIZE)
    assert torch.equal(pattern.positions(), positions)
    x, u = drawn(SIZE, COLUMNS, dtype=dtype, seed=2), drawn(SIZE, COLUMNS, dtype=dtype, seed=3)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for operand in (x, x.T.contiguous().T):  # in both memory layouts
        for transposed in (False, True):
            found = sparse_product(pattern, values, operand, transposed)
            expected = (dense.T if transposed else dense) @ x.double()
            assert found.dtype == dtype
            assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
        sampled = sampled_outer(pattern, u, operand)
        outer = (u.double() @ x.double().T).flatten()[positions]
        assert torch.allclose(sampled.double(), outer, rtol=tolerance, atol=3 * tolerance)


def test_sparse_kernels_are_used_where_they_pay() -> None:
    """The test above would pass if everything were scattered."""
    few, many = Pattern.of(torch.arange(0, SIZE * SIZE, 40), SIZE), Pattern.of(torch.arange(0, SIZE * SIZE, 10), SIZE)
    x = torch.zeros(SIZE, COLUMNS)
    assert sparse._has_kernels(x, few) == torch.backends.mkl.is_available()
    assert not sparse._has_kernels(x, many)
    assert not sparse._has_kernels(x.bfloat16(), few)
