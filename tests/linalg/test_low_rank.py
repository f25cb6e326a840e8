"""Truncated decompositions against the exact one in float64."""

from __future__ import annotations

import math

import pytest
import torch

from surgery.linalg.low_rank import svd_of_map, svd_of_product, truncated_svd


def decaying(rows: int, columns: int, power: float, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values k^-power; 0 is the hardest: no gap anywhere."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, size, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(columns, size, generator=generator))[0]
    return (U * torch.arange(1, size + 1) ** -power) @ V.T


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


MATRICES = {
    "slow decay": decaying(300, 200, 0.3),
    "fast decay": decaying(200, 300, 2.0),
    "flat": decaying(256, 256, 0.0),
    "gaussian": gaussian(400, 300),
    "small": gaussian(20, 12),
    "row": gaussian(1, 50),
    "column": gaussian(50, 1),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_captures_what_the_exact_decomposition_does(name: str, rank: int) -> None:
    matrix = MATRICES[name]
    svd = truncated_svd(matrix, rank)
    exact = torch.linalg.svdvals(matrix.double()).square()
    kept = min(rank, *matrix.shape)
    assert svd.S.shape == (kept,)
    captured = float((svd.U.double().T @ matrix.double()).square().sum())
    assert captured >= 0.999 * float(exact[:kept].sum())
    B, A = svd.balanced()
    error = float((matrix.double() - B.double() @ A.double()).norm())
    whole = float(exact.sum()) ** 0.5
    # A float32 difference of energies resolves errors down to the root of its rounding.
    assert error == pytest.approx(svd.relative_error * whole, rel=1e-2, abs=2e-3 * whole)
    assert torch.allclose(svd.U.T @ svd.U, torch.eye(kept), atol=1e-4)
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=1e-4)


def test_control_one_pass_without_iteration_misses_it() -> None:
    """What the iteration is for: a single random projection of a flat spectrum captures far less."""
    matrix = MATRICES["gaussian"]
    probe = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(matrix @ probe)[0]
    exact = float(torch.linalg.svdvals(matrix)[:8].square().sum())
    assert float((Q.T @ matrix).square().sum()) < 0.9 * exact


def one_entry(rows: int, columns: int) -> torch.Tensor:
    matrix = torch.zeros(rows, columns)
    matrix[3, 5] = 2.0
    return matrix


# The last ones are large enough for the iteration, whose basis soon spans all that there is.
DEFICIENT = [
    torch.zeros(60, 40),
    torch.ones(60, 40),
    gaussian(90, 2) @ gaussian(2, 80),
    torch.zeros(400, 300),
    torch.ones(400, 300),
    one_entry(400, 300),
    gaussian(400, 1).expand(400, 300),
    gaussian(400, 2) @ gaussian(2, 300),
    gaussian(400, 9) @ gaussian(9, 300),
]


@pytest.mark.parametrize("matrix", DEFICIENT)
def test_zero_and_rank_deficient(matrix: torch.Tensor) -> None:
    svd = truncated_svd(matrix, 8)
    B, A = svd.balanced()
    assert torch.isfinite(B).all() and torch.isfinite(A).all()
    assert torch.allclose(svd.U.T @ svd.U, torch.eye(8), atol=1e-4)
    if int(torch.linalg.matrix_rank(matrix.double())) <= 8:
        assert float((matrix - B @ A).norm()) <= 1e-4 * max(float(matrix.norm()), 1.0)
        assert svd.relative_error < 2e-3
    assert torch.allclose(svd.S.double(), torch.linalg.svdvals(matrix.double())[:8], atol=1e-4 * float(matrix.norm()))


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scale(scale: float) -> None:
    matrix = MATRICES["slow decay"]
    svd, scaled = truncated_svd(matrix, 8), truncated_svd(matrix * scale, 8)
    assert torch.allclose(scaled.S / scale, svd.S, rtol=1e-4)
    assert scaled.relative_error == pytest.approx(svd.relative_error, rel=1e-3)


def test_same_seed_same_result_and_canonical_signs() -> None:
    first, second = (truncated_svd(MATRICES["gaussian"], 8, seed=3) for _ in range(2))
    assert torch.equal(first.U, second.U)
    largest = first.Vh.gather(1, first.Vh.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_from_factors(dtype: torch.dtype) -> None:
    B, A = gaussian(70, 6).to(dtype), gaussian(6, 50).to(dtype)
    svd = svd_of_product(B, A)
    exact = torch.linalg.svdvals((B @ A).double())
    assert torch.allclose(svd.S.double(), exact[:6], rtol=1e-5)
    assert torch.allclose((svd.U * svd.S) @ svd.Vh, B @ A, atol=1e-4)
    assert svd.relative_error == pytest.approx(0, abs=1e-3)


def test_product_wider_than_the_matrix() -> None:
    """More ranks than rows: the core is as small as the matrix."""
    B, A = gaussian(5, 9), gaussian(9, 40)
    assert svd_of_product(B, A).S.shape == (5,)


class Counted:
    """A matrix that is known by its products, which are counted."""

    def __init__(self, matrix: torch.Tensor, counter: list[int]) -> None:
        self.matrix, self.counter = matrix, counter
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device

    @property
    def T(self) -> Counted:
        return Counted(self.matrix.T, self.counter)

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        self.counter.append(other.shape[1])
        return self.matrix @ other


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_map_captures_what_the_exact_decomposition_does(name: str, rank: int) -> None:
    matrix = MATRICES[name]
    counter: list[int] = []
    svd = svd_of_map(Counted(matrix, counter), rank)
    kept = min(rank, *matrix.shape)
    exact = torch.linalg.svdvals(matrix.double())[:kept]
    assert svd.S.shape == (kept,) and math.isnan(svd.energy)
    # What is asked for is half a per cent, of an estimate.
    for found in (svd.Vh.double() @ matrix.double().T, svd.U.double().T @ matrix.double()):
        assert float(found.square().sum()) >= 0.99 * float(exact.square().sum())
    assert torch.allclose(svd.U.T @ svd.U, torch.eye(kept), atol=1e-4)
    assert torch.allclose(svd.Vh @ svd.Vh.T, torch.eye(kept), atol=1e-4)
    assert torch.allclose((svd.U.T @ matrix @ svd.Vh.T).double(), torch.diag(svd.S.double()), atol=1e-3 * exact[0])
    # Block by block, or the whole at once where that is no more.
    assert set(counter) == {rank + 8 if 3 * (rank + 8) < min(matrix.shape) else matrix.shape[1]}


def test_map_takes_more_products_where_more_is_asked_for() -> None:
    counts, missed = [], []
    matrix = MATRICES["gaussian"]
    exact = float(torch.linalg.svdvals(matrix)[:8].square().sum())
    for missing in (0.5, 5e-3, 1e-6):
        counter: list[int] = []
        svd = svd_of_map(Counted(matrix, counter), 8, missing=missing)
        counts.append(len(counter))
        missed.append(1 - float((matrix @ svd.Vh.T).square().sum()) / exact)
    assert counts == sorted(counts) and counts[0] < counts[2]
    assert missed[0] > 0.01 > missed[1] >= missed[2] and missed[2] < 1e-4


def test_map_stops_soon_where_the_spectrum_falls() -> None:
    """Real gradients take two or three blocks; each is a product with the matrix and one with its transpose."""
    counter: list[int] = []
    svd_of_map(Counted(MATRICES["fast decay"], counter), 8)
    assert len(counter) <= 6


@pytest.mark.parametrize("matrix", DEFICIENT)
def test_map_of_zero_and_rank_deficient(matrix: torch.Tensor) -> None:
    svd = svd_of_map(Counted(matrix, []), 8)
    assert torch.allclose(svd.U.T @ svd.U, torch.eye(8), atol=1e-4)
    assert torch.allclose(svd.Vh @ svd.Vh.T, torch.eye(8), atol=1e-4)
    exact = torch.linalg.svdvals(matrix.double())[:8]
    assert torch.allclose(svd.S.double(), exact, atol=1e-4 * float(matrix.norm()))
