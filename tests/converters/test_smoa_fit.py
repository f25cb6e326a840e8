"""Fits of SMoA: each half of a sweep is a least squares solution."""

from __future__ import annotations

import itertools

import pytest
import torch

from surgery.converters.smoa_fit import fit_masked


def random(*shapes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_a_step_is_the_least_squares_solution_of_all_rows(monkeypatch) -> None:
    """One sweep from given A: B by a dense solver over all its entries, then A by another; in several batches."""
    monkeypatch.setattr("surgery.converters.smoa_fit.SWEEPS", 1)
    monkeypatch.setattr("surgery.converters.smoa_fit.BATCH_BYTES", 8 * 3 * 7 * 2)
    target, M1, M2, A1, A2 = random((5, 7), (5, 7), (5, 7), (2, 7), (1, 7))
    weights = random((1, 7), seed=1)[0][0].square()
    fit = fit_masked(target, [M1, M2], [A1, A2], weights)
    root = weights.sqrt()

    def columns(vary_B: bool, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        found = []
        for index in range((B if vary_B else A).numel()):
            one = torch.zeros_like(B if vary_B else A)
            one.view(-1)[index] = 1.0
            b, a = (one, A) if vary_B else (B, one)
            found.append(((M1 * (b[:, :2] @ a[:2]) + M2 * (b[:, 2:] @ a[2:])) * root).flatten())
        return torch.stack(found, 1)

    goal = (target * root).flatten()[:, None]
    A = torch.cat([A1, A2])
    B = torch.linalg.lstsq(columns(True, torch.zeros(5, 3, dtype=torch.float64), A), goal).solution.view(5, 3)
    torch.testing.assert_close(fit.B, B, rtol=1e-3, atol=1e-3)
    # Against the fit's own B, from which A was made. The ridge holds back columns of next to no weight, so what counts
    # is what is left.
    best = columns(False, fit.B, A)
    least = float((goal - best @ torch.linalg.lstsq(best, goal).solution).norm() / goal.norm())
    left = (target - M1 * (fit.B[:, :2] @ fit.A[:2]) - M2 * (fit.B[:, 2:] @ fit.A[2:])) * root
    assert float(left.norm() / goal.norm()) == pytest.approx(least, rel=1e-3)
    assert fit.relative_error == pytest.approx(float(left.norm() / goal.norm()), rel=1e-9)


def test_sweeps_lower_the_error_and_zero_masks_are_no_hindrance() -> None:
    target, M1, M2, A1, A2 = random((12, 9), (12, 9), (12, 9), (2, 9), (2, 9), seed=3)
    M1[:4], M2[:4], M1[:, 2], M2[:, 2] = 0, 0, 0, 0
    fit = fit_masked(target, [M1, M2], [A1, A2], None)
    assert len(fit.errors) > 3
    assert all(later <= before * (1 + 1e-6) for before, later in itertools.pairwise(fit.errors))
    assert not fit.B[:4].any() and not fit.A[:, 2].any()
    assert fit.B.isfinite().all() and float(fit.B.abs().max()) < 1e3
    assert fit_masked(target * 0, [M1, M2], [A1, A2], None).relative_error == 0
