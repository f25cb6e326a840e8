"""Singular values and effective ranks of changes, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery.deltas.operators import LowRank, Sum
from surgery.deltas.products import HadamardProduct, Kronecker, as_low_rank
from surgery.deltas.spectrum import effective_rank, has_cheap_spectrum, singular_values


def pair(out: int, rank: int, size: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=generator), torch.randn(rank, size, generator=generator), 0.7)


@pytest.mark.parametrize(
    "delta",
    [
        pair(13, 4, 9, 0),
        Sum([(1.5, pair(13, 2, 9, 0)), (-1.0, pair(13, 2, 9, 1))]),
        HadamardProduct(pair(30, 2, 20, 0), pair(30, 3, 20, 1), 2.0),
        Kronecker(pair(4, 2, 5, 0), pair(6, 1, 3, 1), -0.5),
        Kronecker(as_low_rank(torch.randn(3, 4)), as_low_rank(torch.randn(5, 2)), 3.0),
    ],
)
def test_singular_values_are_those_of_the_dense_matrix(delta: Any) -> None:
    assert has_cheap_spectrum(delta)
    expected = torch.linalg.svdvals(delta.dense().double())
    found = singular_values(delta)
    assert len(found) <= len(expected)
    torch.testing.assert_close(found, expected[: len(found)], atol=1e-5, rtol=1e-5)
    assert float(expected[len(found) :].sum()) < 1e-4
    assert not torch.allclose(found * 1.01, expected[: len(found)], rtol=1e-5)


def test_a_change_without_factors_is_decomposed_whole() -> None:
    full = HadamardProduct(pair(6, 3, 5, 0), pair(6, 3, 5, 1))
    assert not has_cheap_spectrum(full)
    torch.testing.assert_close(singular_values(full), torch.linalg.svdvals(full.dense().double()))


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99, 1.0])
def test_effective_rank_is_tight(share: float) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).sort(descending=True).values.double()
    energy = values.square()
    rank = effective_rank(values, share)
    assert float(energy[:rank].sum() / energy.sum()) >= share - 1e-12
    assert float(energy[: rank - 1].sum() / energy.sum()) < share


def test_effective_rank_at_its_edges() -> None:
    assert effective_rank(torch.zeros(4), 0.95) == 0
    assert effective_rank(torch.zeros(0), 0.95) == 0
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0]), 1.0) == 1
    assert effective_rank(torch.ones(7), 1.0) == 7
    assert effective_rank(torch.tensor([3.0, 1.0]), 0.9) == 1  # exactly 9 of 10
