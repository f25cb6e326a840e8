"""Fits of FRoD: patterns and gains, against least squares."""

from __future__ import annotations

import pytest
import torch

from surgery.adapters.source import Change
from surgery.converters.frod_fit import Problem, fit_role, solved
from surgery.converters.to_frod import _problem


def test_solution_on_a_support_is_the_least_squares_one() -> None:
    """Against a dense solver with one column for each entry of the support; few and many rows."""
    for rows in (6, 20):
        generator = torch.Generator().manual_seed(rows)
        n = 10
        U, V, root, dW = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((rows, n), (n, n), (n, n), (rows, n))
        )
        U = U / U.norm(dim=0)
        U[:, 3] = 0  # the layer has no part in this direction
        C = root @ root.T
        problem = Problem(U, V.T @ C @ V, U.T @ dW @ C @ V, float(((dW @ C) * dW).sum()))
        support = torch.rand(n, n, generator=generator) < 0.2
        support.fill_diagonal_(True)
        X = solved(problem, support, torch.zeros(n, n, dtype=torch.float64), 500)
        half = torch.linalg.cholesky(C)
        places = support.nonzero()
        columns = torch.stack([torch.outer(U[:, i], half.T @ V[:, j]).flatten() for i, j in places], 1)
        best = torch.linalg.lstsq(columns, (dW @ half).flatten()[:, None], driver="gelsd").solution[:, 0]
        left = float(((dW @ half).flatten() - columns @ best).square().sum())
        assert problem.lost(X) == pytest.approx(left, rel=1e-5)
        assert not X[~support].any() and not X[3].any()
        # A control: an entry that is a little off loses more.
        X[places[0][0], places[0][1]] += 0.1
        assert problem.lost(X) > left * (1 + 1e-5)


@pytest.mark.parametrize("measured", [False, True])
def test_the_problem_of_a_layer_is_that_of_its_dense_change(measured: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    W, B, A, V, root = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 5), (7, 2), (2, 5), (5, 5), (9, 5))
    )
    C = root.T @ root if measured else None
    dW, metric = B @ A, torch.eye(5, dtype=torch.float64) if C is None else C
    inverse = torch.linalg.inv(V).T
    U = W @ inverse
    problem = _problem(Change("layer", B, A), W, V, inverse, U.norm(dim=0), C)
    U = U / U.norm(dim=0)
    torch.testing.assert_close(problem.U, U)
    torch.testing.assert_close(problem.right, V.T @ metric @ V)
    torch.testing.assert_close(problem.target, U.T @ dW @ metric @ V)
    assert problem.energy == pytest.approx(float(((dW @ metric) * dW).sum()))


def test_gains_are_those_of_single_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    U, V, dW = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    problem = Problem(U, V.T @ V, U.T @ dW @ V, float(dW.square().sum()))
    X = torch.diag(torch.randn(8, generator=generator, dtype=torch.float64))
    left = dW - U @ X @ V.T
    for i, j in ((0, 5), (7, 2)):
        single = torch.outer(U[:, i], V[:, j])
        gain = float((single * left).sum() ** 2 / single.square().sum())
        assert float(problem.gains(X)[i, j]) == pytest.approx(gain, rel=1e-9)
    assert problem.lost(X) == pytest.approx(float(left.square().sum()), rel=1e-9)


@pytest.mark.parametrize("strong_mean", [False, True])
def test_the_chosen_pattern_beats_a_random_one(strong_mean: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    n, count = 40, 60
    U, V, B, A = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((n, n), (n, n), (n, 3), (3, n)))
    U = U / U.norm(dim=0)
    mean = torch.randn(n, generator=generator, dtype=torch.float64) * (10 if strong_mean else 0)
    C = torch.eye(n, dtype=torch.float64) + torch.outer(mean, mean)
    problem = Problem(U, V.T @ C @ V, U.T @ (B @ A) @ C @ V, float(((B @ A @ C) * (B @ A)).sum()))
    fit = fit_role(count, 1, lambda layer: problem)
    assert len(fit.positions.unique()) == count and not (fit.positions % (n + 1) == 0).any()
    assert torch.equal(fit.positions, fit.positions.sort().values)
    middle = torch.diag(fit.diagonals[0])
    middle.view(-1)[fit.positions] = fit.values[0]
    difference = B @ A - U @ middle @ V.T
    assert fit.lost == pytest.approx(float(((difference @ C) * difference).sum()), rel=1e-6)
    for _ in range(3):
        support = torch.rand(n, n, generator=generator).fill_diagonal_(2.0)
        support = support >= support.flatten().topk(count + n).values[-1]
        assert problem.lost(solved(problem, support, torch.zeros_like(C), 500)) > fit.lost
