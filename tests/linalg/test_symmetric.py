"""In-place symmetric routines: LAPACK's and torch's (as on a GPU) against plain formulas."""

from __future__ import annotations

import pytest
import torch

from surgery.linalg import symmetric
from surgery.linalg.joint import joint_basis
from tests.helpers.joint_reference import category


@pytest.fixture(params=["lapack", "torch"])
def backend(request, monkeypatch) -> str:
    """Both roads on the CPU: the one for GPUs has nothing in it that needs one."""
    if request.param == "torch":
        monkeypatch.setattr(symmetric, "_on_cpu", lambda tensor: False)
    return request.param


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def lower(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.tril()


@pytest.mark.parametrize("transposed", [False, True])
def test_add_gram(backend: str, transposed: bool) -> None:
    W = draw(9, 6).T.contiguous().T if transposed else draw(9, 6)
    total = draw(6, 6)
    expected = total + W.T @ W
    assert torch.allclose(lower(symmetric.add_gram_(total, W)), lower(expected))


def test_cholesky_and_inverse(backend: str) -> None:
    A = draw(9, 6).T @ draw(9, 6) + torch.eye(6).double()
    L = A.clone()
    assert symmetric.cholesky_(L)
    assert torch.allclose(L @ L.T, A) and torch.equal(L, L.tril())
    inverse = symmetric.spd_inverse_(A.tril().clone())
    assert torch.allclose(symmetric.fill_upper_(inverse) @ A, torch.eye(6).double(), atol=1e-10)
    indefinite = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert not symmetric.cholesky_(indefinite.clone())
    with pytest.raises(ValueError, match="positive definite"):
        symmetric.spd_inverse_(indefinite)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fortran", [False, True])
def test_triangular(backend: str, transposed: bool, fortran: bool) -> None:
    L = draw(6, 6).tril() + 3 * torch.eye(6).double()
    M = draw(6, 4).T.contiguous().T if fortran else draw(6, 4)
    op = L.T if transposed else L
    kept = M.clone()
    assert torch.allclose(op @ symmetric.triangular_solve(L, M, transposed=transposed), kept)
    assert torch.equal(M, kept)
    expected = op @ M
    assert torch.allclose(symmetric.triangular_product(L, M, transposed=transposed), expected)


def test_eigenvectors(backend: str) -> None:
    A = draw(9, 6).T @ draw(9, 6)
    values, vectors = symmetric.eigh_(A.tril().clone())
    assert torch.allclose(A @ vectors, vectors * values, atol=1e-10)
    assert bool((values.diff() >= 0).all())


def test_fill_upper_over_several_blocks() -> None:
    A = draw(1100, 1100)
    A = A + A.T
    assert torch.equal(symmetric.fill_upper_(A.tril() + draw(1100, 1100).triu(1)), A)


def test_widener_reuses_its_buffer() -> None:
    widen = symmetric.Widener()
    first = widen(torch.ones(4, 3))
    assert first.dtype == torch.float64 and first.is_contiguous()
    second = widen(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert second.data_ptr() == first.data_ptr() and second.shape == (2, 3)
    assert torch.equal(widen(torch.ones(5, 4).T), torch.ones(4, 5).double())


@pytest.mark.parametrize(("layers", "rows", "columns"), [(4, 48, 32), (6, 12, 32), (2, 9, 32), (1, 40, 32)])
def test_joint_basis_is_the_same_on_both(layers: int, rows: int, columns: int, monkeypatch) -> None:
    weights = category(layers, rows, columns)
    lapack = joint_basis(lambda start: weights[start:], columns)
    monkeypatch.setattr(symmetric, "_on_cpu", lambda tensor: False)
    plain = joint_basis(lambda start: weights[start:], columns)
    assert float((lapack.V - plain.V).abs().max()) < 1e-8
    assert float((lapack.inverse_transposed - plain.inverse_transposed).abs().max()) < 1e-6
