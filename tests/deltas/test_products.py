"""Hadamard and Kronecker products against dense float64 formulas."""

from __future__ import annotations

import pytest
import torch

from surgery.deltas.operators import Delta, LowRank
from surgery.deltas.products import HadamardProduct, Kronecker, as_low_rank


def pair(out: int, rank: int, size: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return LowRank(B, torch.randn(rank, size, generator=generator, dtype=torch.float64))


def check(delta: Delta, expected: torch.Tensor, thin: bool) -> None:
    """All that a change says of itself agrees with its dense matrix."""
    assert delta.shape == tuple(expected.shape)
    torch.testing.assert_close(delta.dense(), expected)
    x = torch.randn(2, 3, expected.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(delta.apply(x), x @ expected.T)
    factors = delta.factors()
    assert (factors is not None) == thin
    if factors is not None:
        B, A = factors
        assert A.shape[0] < min(expected.shape)
        torch.testing.assert_close(B @ A, expected)
    torch.testing.assert_close(delta.norm(), torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize(
    ("out", "size", "r1", "r2", "thin"), [(17, 11, 2, 3, True), (11, 17, 4, 3, False), (7, 7, 1, 1, True)]
)
def test_hadamard_product(out: int, size: int, r1: int, r2: int, thin: bool) -> None:
    first, second = pair(out, r1, size, 0), pair(out, r2, size, 1)
    expected = 0.7 * (first.B @ first.A) * (second.B @ second.A)
    check(HadamardProduct(first, second, 0.7), expected, thin)
    # A control: the product of the matrices' sums is another matrix.
    assert not torch.allclose(HadamardProduct(first, first, 0.7).dense(), expected)


def test_hadamard_product_wants_equal_shapes() -> None:
    with pytest.raises(ValueError, match="elementwise"):
        HadamardProduct(pair(4, 1, 3, 0), pair(3, 1, 4, 0))


@pytest.mark.parametrize("whole", [(), ("left",), ("right",), ("left", "right")])
@pytest.mark.parametrize(("a", "b", "c", "d"), [(2, 3, 5, 4), (4, 1, 3, 7), (3, 3, 3, 3)])
def test_kronecker(a: int, b: int, c: int, d: int, whole: tuple[str, ...]) -> None:
    left, right = pair(a, 1, b, 0), pair(c, 2, d, 1)
    expected = torch.einsum("ab,cd->acbd", left.dense(), right.dense()).reshape(a * c, b * d) * -1.5
    parts = [as_low_rank(side.dense()) if name in whole else side for name, side in (("left", left), ("right", right))]
    rank = parts[0].A.shape[0] * parts[1].A.shape[0]
    check(Kronecker(parts[0], parts[1], -1.5), expected, rank < min(expected.shape))
    if a * b > 1 and (a, b) != (c, d):
        swapped = Kronecker(parts[1], parts[0], -1.5).dense()
        assert swapped.shape != expected.shape or not torch.allclose(swapped, expected)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 4), (4, 4)])
def test_as_low_rank_is_the_matrix_at_its_smaller_side(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = as_low_rank(matrix)
    assert torch.equal(whole.dense(), matrix)
    assert whole.A.shape[0] == min(shape)
