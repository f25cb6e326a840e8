"""Seeded draws: their distribution, their reproducibility, and the sketch that recognises a matrix."""

from __future__ import annotations

import pytest
import torch

from surgery.linalg.seeded import generator_for, kaiming_normal, kaiming_uniform, normal, off_diagonal_pattern, sketch


def test_distributions() -> None:
    generator = generator_for(0, "x")
    assert float(normal((400, 300), 0.5, generator).std()) == pytest.approx(0.5, rel=0.02)
    assert float(kaiming_normal((400, 300), generator).std()) == pytest.approx((2 / 300) ** 0.5, rel=0.02)
    uniform = kaiming_uniform((400, 300), generator)
    assert float(uniform.abs().max()) <= (6 / 300) ** 0.5 + 1e-7
    assert float(uniform.std()) == pytest.approx((2 / 300) ** 0.5, rel=0.02)


def test_named_generators_are_independent_of_order() -> None:
    first = torch.randn(5, generator=generator_for(1, "a"))
    torch.randn(5, generator=generator_for(1, "b"))
    assert torch.equal(first, torch.randn(5, generator=generator_for(1, "a")))
    assert not torch.equal(first, torch.randn(5, generator=generator_for(1, "b")))
    assert not torch.equal(first, torch.randn(5, generator=generator_for(2, "a")))


@pytest.mark.parametrize(("size", "count"), [(30, 9), (30, 800), (30, 870), (5, 1), (2, 2), (1, 0)])
def test_pattern_is_off_diagonal_unique_and_sorted(size: int, count: int) -> None:
    positions = off_diagonal_pattern(size, count, generator_for(0, "p"))
    assert positions.shape == (count,)
    assert bool((positions.diff() > 0).all())
    assert bool((positions // size != positions % size).all())
    assert bool((positions < size * size).all())


@pytest.mark.parametrize("count", [20, 300])
def test_pattern_is_uniform(count: int) -> None:
    """Both ways of drawing hit every off-diagonal place equally often."""
    size, rounds = 25, 3000
    hits = torch.zeros(size * size)
    for seed in range(rounds):
        hits[off_diagonal_pattern(size, count, torch.Generator().manual_seed(seed))] += 1
    expected = rounds * count / (size * (size - 1))
    off_diagonal = hits[~torch.eye(size, dtype=torch.bool).flatten()]
    assert float((off_diagonal - expected).abs().max()) < 6 * expected**0.5


def test_too_many_places_are_refused() -> None:
    with pytest.raises(ValueError, match="off-diagonal"):
        off_diagonal_pattern(3, 7, generator_for(0, "p"))


def test_sketch_sees_one_flipped_column_but_not_rounding() -> None:
    matrix = torch.randn(500, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reference = sketch(matrix)
    norm = float(reference[0])

    def moved(other: torch.Tensor) -> float:
        return float((sketch(other) - reference).abs().max()) / norm

    assert moved(matrix * (1 + 1e-7)) < 1e-5
    flipped = matrix.clone()
    flipped[:, 17] *= -1
    assert moved(flipped) > 1e-3
    swapped = matrix[:, torch.tensor([1, 0, *range(2, 500)])]
    assert moved(swapped) > 1e-3
    assert sketch(torch.empty(0)).shape == (9,)
