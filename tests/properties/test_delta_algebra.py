"""Properties of the weight changes: all ways of using one agree with the matrix of its definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.deltas.operators import Delta, Hadamard, InputMap, LowRank, Sum
from surgery.deltas.products import HadamardProduct, Kronecker, as_low_rank
from surgery.deltas.sparse import Pattern
from surgery.deltas.spectrum import has_cheap_spectrum, singular_values
from tests.properties.examples import SEEDS, examples, generator


@dataclass
class Drawn:
    """A change and its matrix, made from the same tensors by the definition."""

    delta: Delta
    matrix: torch.Tensor


Draw = Callable[..., torch.Tensor]


def draw_low_rank(draw: Draw, out: int, width: int, rank: int) -> Drawn:
    B, A = draw(out, rank), draw(rank, width)
    return Drawn(LowRank(B, A, -0.7), -0.7 * B @ A)


def draw_hadamard(draw: Draw, out: int, width: int, rank: int) -> Drawn:
    masks = [draw(out, width) for _ in range(3)]
    pairs = [(draw(out, rank), draw(rank, width)) for _ in masks]
    matrix = sum(mask * (B @ A) for mask, (B, A) in zip(masks, pairs, strict=True))
    assert isinstance(matrix, torch.Tensor)
    return Drawn(Hadamard(masks[0] + masks[1] + masks[2], masks[:2], pairs), matrix)


def draw_product(draw: Draw, out: int, width: int, rank: int) -> Drawn:
    first, second = (LowRank(draw(out, r), draw(r, width), scale) for r, scale in ((rank, 0.5), (1, 3.0)))
    matrix = 2.0 * (0.5 * first.B @ first.A) * (3.0 * second.B @ second.A)
    return Drawn(HadamardProduct(first, second, 2.0), matrix)


def draw_kronecker(draw: Draw, out: int, width: int, rank: int) -> Drawn:
    small = draw(out, width)
    B, A = draw(2, rank), draw(rank, 3)
    return Drawn(Kronecker(LowRank(B, A), as_low_rank(small), -0.5), -0.5 * torch.kron(B @ A, small))


def draw_input_map(draw: Draw, out: int, width: int, rank: int) -> Drawn:
    W, P, gain, diagonal, Q = draw(out, width), draw(width, width), draw(width), draw(width), draw(width, width)
    # No place twice, and possibly none at all.
    positions = torch.arange(1, width * width, 2)[: rank - 1]
    values = draw(len(positions))
    S = torch.zeros(width * width, dtype=torch.float64)
    S[positions] = values
    T = P @ torch.diag(gain) @ (torch.diag(diagonal) + S.reshape(width, width)) @ Q
    return Drawn(InputMap(W, P, gain, diagonal, values, Pattern.of(positions, width), Q.T), W @ T)


DRAWS = {
    "low rank": draw_low_rank,
    "hadamard": draw_hadamard,
    "product": draw_product,
    "kronecker": draw_kronecker,
    "input map": draw_input_map,
}


def drawn(kind: str, out: int, width: int, rank: int, seed: int) -> Drawn:
    draws = generator(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draws)

    return DRAWS[kind](draw, out, width, rank)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max().clamp_min(1)))


KINDS = st.sampled_from(sorted(DRAWS))
SIDES = st.integers(1, 9)


@given(KINDS, SIDES, SIDES, st.integers(1, 4), SEEDS)
@examples(70)
def test_every_way_of_using_a_change_is_its_matrix(kind: str, out: int, width: int, rank: int, seed: int) -> None:
    case = drawn(kind, out, width, rank, seed)
    delta, matrix = case.delta, case.matrix
    assert delta.shape == tuple(matrix.shape) and close(delta.dense(), matrix)
    x = torch.randn(3, 2, matrix.shape[1], dtype=torch.float64, generator=generator(seed + 1))
    assert close(delta.apply(x), x @ matrix.T)
    with torch.no_grad():
        assert close(delta.apply(x[0, 0]), matrix @ x[0, 0])
    factors = delta.factors()
    assert factors is None or close(factors[0] @ factors[1], matrix)
    assert factors is None or has_cheap_spectrum(delta)
    assert float(delta.norm()) == pytest.approx(float(matrix.norm()), rel=1e-9)
    root = x.reshape(-1, matrix.shape[1])
    assert float(delta.norm(root.T @ root)) == pytest.approx(float((matrix @ root.T).norm()), rel=1e-6, abs=1e-7)
    exact = torch.linalg.svdvals(matrix)
    values = singular_values(delta)
    assert close(values, exact[: len(values)]) and float(exact[len(values) :].sum()) <= 1e-9 * float(exact[0])


@given(KINDS, KINDS, SIDES, SIDES, st.integers(1, 3), SEEDS, st.sampled_from([-2.0, 0.0, 0.25]))
@examples(50)
def test_sums_and_differences(one: str, other: str, out: int, width: int, rank: int, seed: int, weight: float) -> None:
    a, b = (drawn(kind, out, width, rank, seed + i) for i, kind in enumerate((one, other)))
    if a.delta.shape != b.delta.shape:
        with pytest.raises(ValueError, match="shapes"):
            a.delta.minus(b.delta)
        return
    for delta, matrix in (
        (a.delta.minus(b.delta), a.matrix - b.matrix),
        (Sum([(weight, a.delta), (1.5, b.delta), (1.0, a.delta.minus(b.delta))]), None),
    ):
        wanted = matrix if matrix is not None else (weight + 1) * a.matrix + 0.5 * b.matrix
        x = torch.randn(4, wanted.shape[1], dtype=torch.float64, generator=generator(seed))
        assert close(delta.dense(), wanted) and close(delta.apply(x), x @ wanted.T)
        factors = delta.factors()
        assert factors is None or close(factors[0] @ factors[1], wanted)
        assert (factors is None) == (a.delta.factors() is None or b.delta.factors() is None)
        assert float(delta.norm()) == pytest.approx(float(wanted.norm()), rel=1e-8, abs=1e-9)
    # What is the same is exactly zero apart.
    assert not bool(a.delta.minus(a.delta).apply(x).any())


@given(KINDS, SIDES, SIDES, st.integers(1, 3), SEEDS)
@examples(40)
def test_the_gradient_is_that_of_the_matrix(kind: str, out: int, width: int, rank: int, seed: int) -> None:
    """In the input, through every structure."""
    case = drawn(kind, out, width, rank, seed)
    x = torch.randn(3, case.matrix.shape[1], dtype=torch.float64, generator=generator(seed)).requires_grad_()
    aim = torch.randn(3, case.matrix.shape[0], dtype=torch.float64, generator=generator(seed + 1))
    (case.delta.apply(x) * aim).sum().backward()
    assert x.grad is not None and close(x.grad, aim @ case.matrix)
