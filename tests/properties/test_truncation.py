"""Properties of truncation: the best approximation there is, and no rank more than what was asked for."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.deltas.spectrum import effective_rank
from surgery.linalg.low_rank import svd_of_map, svd_of_product, truncated_svd
from surgery.linalg.metric import energy_rank, greedy_ranks, metric_svd
from tests.properties.examples import SEEDS, examples, generator

SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))
# Falling, flat, of three directions, and nothing at all.
SPECTRA = {"falling": 0.6, "slow": 0.95, "flat": 1.0, "thin": 0.0, "zero": -1.0}
# Integers have exact squares and shares of a power of two exact products: the reference is rational arithmetic.
VALUES = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(lambda values: sorted(values, reverse=True))
SHARES = st.integers(1, 64)


def matrix_of(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    draws = generator(seed)
    count = min(rows, columns)
    U = torch.linalg.qr(torch.randn(rows, count, dtype=torch.float64, generator=draws))[0]
    V = torch.linalg.qr(torch.randn(columns, count, dtype=torch.float64, generator=draws))[0]
    falls = SPECTRA[kind]
    S = torch.full((count,), float(falls >= 0), dtype=torch.float64)
    S = S * falls ** torch.arange(count) if falls > 0 else torch.where(torch.arange(count) < 3, S, 0.0)
    return (U * S) @ V.T


@given(SIZES, st.sampled_from(sorted(SPECTRA)), st.integers(1, 8), st.sampled_from(["float32", "float64"]), SEEDS)
@examples(60)
def test_truncation_is_optimal(size, kind: str, rank: int, dtype: str, seed: int) -> None:
    """Eckart and Young: what is cut off is the tail of the spectrum, up to the iteration's 0.1 % of the energy."""
    matrix = matrix_of(kind, *size, seed).to(getattr(torch, dtype))
    wide = matrix.double()
    kept = min(rank, *size)
    squares = torch.linalg.svdvals(wide).square()
    total, tail = float(squares.sum()), float(squares[kept:].sum())
    slack = 1e-3 * (total - tail) + 1e-10 * total
    svd = truncated_svd(matrix, rank)
    cut = (svd.U * svd.S) @ svd.Vh
    lost = float((wide - cut.double()).square().sum())
    assert svd.S.shape == (kept,) and tail - 1e-6 * total <= lost <= tail + slack
    assert svd.relative_error**2 * total == pytest.approx(lost, rel=1e-3, abs=2e-6 * total + 1e-30)
    B, A = svd.balanced()
    assert torch.allclose((B @ A), cut, atol=1e-5 * (total**0.5 + 1e-30))
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=1e-4, atol=1e-6)
    found = svd_of_map(matrix, rank)
    assert float((found.Vh.double() @ wide.T).square().sum()) >= 0.99 * (total - tail)


@given(SIZES, st.integers(1, 9), SEEDS)
@examples(25)
def test_the_spectrum_of_a_product_is_that_of_the_dense_matrix(size, rank: int, seed: int) -> None:
    draws = generator(seed)
    B = torch.randn(size[0], rank, dtype=torch.float64, generator=draws)
    A = torch.randn(rank, size[1], dtype=torch.float64, generator=draws)
    svd = svd_of_product(B, A)
    count = min(rank, *size)
    assert svd.S.shape == (count,)
    assert torch.allclose(svd.S, torch.linalg.svdvals(B @ A)[:count], rtol=1e-9, atol=1e-9)
    assert torch.allclose((svd.U * svd.S) @ svd.Vh, B @ A, atol=1e-9 * float(svd.S[0] + 1))
    assert svd.energy == pytest.approx(float((B @ A).square().sum()), rel=1e-9)


@given(VALUES, SHARES)
@examples(60)
def test_the_rank_for_a_share_of_the_energy_is_tight(values: list[int], share: int) -> None:
    squares = [Fraction(value) ** 2 for value in values]
    enough = [k for k in range(len(values) + 1) if sum(squares[:k]) >= Fraction(share, 64) * sum(squares)]
    least = enough[0] if sum(squares) else 0
    S = torch.tensor(values, dtype=torch.float64)
    assert effective_rank(S, share / 64) == least
    # A share of one keeps every direction that there is, even those of zero.
    assert energy_rank(S, share / 64) == (len(values) if share == 64 and sum(squares) else least)


@given(st.lists(VALUES, min_size=1, max_size=4), SHARES)
@examples(40)
def test_ranks_for_an_error_are_the_fewest(spectra: list[list[int]], part: int) -> None:
    """At equal costs no other choice of ranks with this error has fewer directions."""
    error = part / 64
    named = {f"layer {i}": torch.tensor(values, dtype=torch.float64) for i, values in enumerate(spectra)}
    ranks = greedy_ranks(named, dict.fromkeys(named, 1), max_error=error)
    every = sorted((Fraction(value) ** 2 for values in spectra for value in values), reverse=True)
    lost = sum(sum(Fraction(v) ** 2 for v in values[ranks[f"layer {i}"] :]) for i, values in enumerate(spectra))
    kept = sum(ranks.values())
    assert lost <= Fraction(part, 64) ** 2 * sum(every)
    assert kept == 0 or sum(every[kept - 1 :]) > Fraction(part, 64) ** 2 * sum(every)


@given(st.lists(VALUES, min_size=1, max_size=4), st.lists(st.integers(1, 9), min_size=4, max_size=4), SEEDS)
@examples(40)
def test_ranks_for_a_budget_fit_it_and_grow_with_it(spectra: list[list[int]], costs: list[int], seed: int) -> None:
    named = {f"layer {i}": torch.tensor(values, dtype=torch.float64) for i, values in enumerate(spectra)}
    price = dict(zip(named, costs, strict=False))
    entries = {name: 1 + (seed + i) % 5 for i, name in enumerate(named)}
    before = dict.fromkeys(named, 0)
    for budget in range(0, 120, 7):
        ranks = greedy_ranks(named, price, entries=entries, budget=budget)
        spent = sum(rank * price[name] + (entries[name] if rank else 0) for name, rank in ranks.items())
        assert spent <= budget and all(ranks[name] >= before[name] for name in named)
        before = ranks
    everything = greedy_ranks(named, price, entries=entries, budget=10_000)
    assert everything == {name: int((S > 0).sum()) for name, S in named.items()}


@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 5), st.integers(1, 30), st.booleans(), SEEDS)
@examples(60)
def test_cuts_in_a_metric_are_optimal_there(
    out: int, width: int, rank: int, samples: int, plain: bool, seed: int
) -> None:
    """Against the decomposition of `F^(1/2) B A C^(1/2)`; of few samples the moments have no full rank."""
    draws = generator(seed)
    B, A, X, G = (
        torch.randn(*shape, dtype=torch.float64, generator=draws)
        for shape in ((out, rank), (rank, width), (samples, width), (samples, out))
    )
    if plain:
        X, G = torch.eye(width, dtype=torch.float64), torch.eye(out, dtype=torch.float64)
    # Root factors of the moments: F = G^T G, C = X^T X.
    exact = torch.linalg.svdvals(G @ B @ A @ X.T)
    moments = (None, None) if plain else ((G @ B).T @ (G @ B), (X @ A.T).T @ (X @ A.T))
    svd = metric_svd(B, A, *moments)
    assert torch.allclose(svd.S, exact[: len(svd.S)], rtol=1e-6, atol=1e-6 * float(exact[0]))
    assert float(exact[len(svd.S) :].square().sum()) <= 1e-10 * float(exact.square().sum())
    errors = []
    for kept in range(len(svd.S) + 1):
        B_cut, A_cut = svd.cut(B, A, kept)
        lost = float((G @ (B @ A - B_cut @ A_cut) @ X.T).square().sum())
        assert lost == pytest.approx(float(exact[kept:].square().sum()), rel=1e-5, abs=1e-9 * float(exact[0] ** 2))
        errors.append(lost)
    assert all(after <= before for before, after in itertools.pairwise(errors))
