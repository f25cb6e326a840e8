"""Rounding with feedback against a loop that solves for every row, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from surgery.codec.entropy import WIDTHS, class_bits
from surgery.codec.feedback import ENOUGH, Curvature, Rounding, RoundingRule, _triangle, rounded

Matrix = NDArray[np.float64]
PRICE = 0.1155  # 2 ln(2) / 12: the price of a bit where a step's error counts 1


def moment(size: int, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """A second moment with a falling spectrum and a few large rows."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(rank or 4 * size, size, generator=generator).double()
    mixing = torch.randn(size, size, generator=generator).double() * torch.arange(1, size + 1) ** -0.7
    samples = samples @ mixing.T
    samples[:, :: max(size // 3, 1)] *= 5
    return samples.T @ samples / len(samples)


def damped(H: torch.Tensor, damping: float = 0.1) -> Matrix:
    return (H + damping * H.diagonal().mean() * torch.eye(len(H)).double()).numpy()


def targets_of(size: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((size, columns)) * np.geomspace(6, 0.3, columns)).astype(np.float32)


def free(columns: int, largest: int = 100) -> RoundingRule:
    """Bits cost nothing."""
    return RoundingRule(np.ones(columns), np.zeros((largest + 1, columns)))


def priced(columns: int, largest: int = 60) -> tuple[RoundingRule, Matrix, Matrix]:
    rng = np.random.default_rng(1)
    bits = PRICE * class_bits(largest)[:, 8 + 4 * np.arange(columns) % 20]
    weights = rng.uniform(0.7, 1.5, columns)
    return RoundingRule(weights, bits), weights, bits


def best_integers(targets: Matrix, weights: Matrix, bits: Matrix) -> tuple[Matrix, Matrix]:
    """Of all integers those that cost least, and what they cost; for targets `(n, r)`."""
    integers = np.arange(1 - len(bits), len(bits))
    costs = weights[:, None] * (targets[..., None] - integers) ** 2 + bits[np.abs(integers)].T
    return integers[costs.argmin(-1)].astype(np.float64), costs.min(-1)


def cost_of(integers: Matrix, targets: Matrix, weights: Matrix, bits: Matrix) -> Matrix:
    magnitudes = np.abs(integers).astype(int)
    return weights * (targets - integers) ** 2 + bits[magnitudes, np.arange(len(weights))]


def solved(H: Matrix, targets: Matrix, weights: Matrix, bits: Matrix) -> Matrix:
    """Row by row, each aiming at what is best for all rows to come, by a linear system for each."""
    left = list(np.argsort(np.diagonal(H), kind="stable"))
    done: list[int] = []
    integers, errors = np.zeros_like(targets), np.zeros_like(targets)
    while left:
        aims = targets[left] + np.linalg.solve(H[np.ix_(left, left)], H[np.ix_(left, done)] @ errors[done])
        row = left.pop()
        remains = H[row, row] - (H[row, left] @ np.linalg.solve(H[np.ix_(left, left)], H[left, row]) if left else 0.0)
        integers[row] = best_integers(aims[-1:], weights * remains, bits)[0][0]
        errors[row] = targets[row] - integers[row]
        done.append(row)
    return integers


def loss(H: Matrix, targets: Matrix, integers: Matrix) -> float:
    return float(np.trace((targets - integers).T @ H @ (targets - integers)))


@pytest.mark.parametrize("pivot", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("price", [PRICE, 20 * PRICE])
@pytest.mark.parametrize("kind", [0, WIDTHS])
def test_rule_against_all_integers(kind: int, price: float, pivot: float) -> None:
    classes = kind + np.arange(6, 40, 3)
    widths = 2.0 ** ((classes % WIDTHS - 12) / 4)
    rng = np.random.default_rng(0)
    targets = rng.standard_normal((1000, len(classes))) * widths
    bits = price * class_bits(2000)[:, classes]
    weights = rng.uniform(0.5, 2.0, len(classes)) / pivot
    found = RoundingRule(weights, bits).nearest(targets.astype(np.float32), 1 / pivot)
    assert found.dtype == np.float32 and (found == np.rint(found)).all()
    weights = weights * pivot
    reach = int(np.abs(targets).max()) + 2
    _, least = best_integers(targets, weights, bits[:reach])
    costs = cost_of(found, targets, weights, bits)
    # Never worse than the nearest integer, the one below it and 0.
    nearest = np.abs(np.rint(targets))
    signed = [np.copysign(z, targets) for z in (nearest, np.maximum(nearest - 1, 0), np.zeros_like(nearest))]
    offered = np.min([cost_of(z, targets, weights, bits) for z in signed], axis=0)
    assert (costs <= offered + 1e-4).all()
    assert costs.sum() <= (1.0005 if price == PRICE else 1.3) * least.sum()
    # Control: without the price it is far from the least.
    assert cost_of(np.rint(targets), targets, weights, bits).sum() > 1.003 * least.sum()


def test_rule_keeps_to_the_largest_code() -> None:
    rule = free(3, largest=7)
    targets = np.array([[-100.0, 7.4, 6.6], [100.0, -7.6, -0.4]], dtype=np.float32)
    assert rule.nearest(targets, 1.0).tolist() == [[-7, 7, 7], [7, -7, 0]]


def test_joined_rules_are_those_of_their_columns() -> None:
    parts = [priced(4, 60)[0], free(2, 7), priced(3, 20)[0]]
    targets = targets_of(300, 9) * 4
    joined = RoundingRule.joined(parts).nearest(targets, 0.8)
    for start, rule in zip((0, 4, 6), parts, strict=True):
        own = slice(start, start + rule.below.shape[1])
        assert (joined[:, own] == rule.nearest(targets[:, own], 0.8)).all()


@pytest.mark.parametrize("size", [1, 7, 8, 9, 41, 150])
def test_feedback_against_a_system_for_every_row(size: int) -> None:
    H, targets = moment(size), targets_of(size, 5)
    rule, weights, bits = priced(5)
    found = rounded([Rounding(Curvature(H, size, 0.1), targets, rule)])[0]
    wanted = solved(damped(H), targets.astype(np.float64), weights, bits)
    # A tie in float32 may fall the other way, and moves what comes after it.
    assert (found != wanted).mean() < 0.02
    assert loss(damped(H), targets, found) == pytest.approx(loss(damped(H), targets, wanted), rel=0.01)


def test_feedback_loses_less_than_rounding_to_the_nearest() -> None:
    H, targets = moment(200), targets_of(200, 6)
    found = rounded([Rounding(Curvature(H, 200, 0.1), targets, free(6))])[0]
    assert loss(damped(H), targets, found) < 0.6 * loss(damped(H), targets, np.rint(targets))
    # Control: feedback for another moment does not help with this one.
    other = rounded([Rounding(Curvature(moment(200, seed=9), 200, 0.1), targets, free(6))])[0]
    assert loss(damped(H), targets, other) > loss(damped(H), targets, np.rint(targets))


def test_layers_side_by_side_are_as_they_are_alone() -> None:
    sizes, widths = [150, 150, 30, 150, 30], [5, 1, 4, 0, 16]
    tasks = []
    for index, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        curve = Curvature(moment(size, seed=index) if index != 2 else None, size, 0.1)
        tasks.append(Rounding(curve, targets_of(size, width, seed=index), priced(width, 20 + 9 * index)[0]))
    for task, together in zip(tasks, rounded(tasks), strict=True):
        assert together.shape == task.targets.shape
        # Products of another width may round the other way.
        assert (together != rounded([task])[0]).sum() <= 0.01 * together.size


def test_identity_is_rounding_by_the_rule() -> None:
    targets, rule = targets_of(3000, 5), priced(5)[0]
    for given in (None, torch.zeros(3000, 3000)):
        curve = Curvature(given, 3000, 0.1)
        assert curve.is_identity and curve.pivot == 1.0
        assert (rounded([Rounding(curve, targets, rule)])[0] == rule.nearest(targets, 1.0)).all()
    columns = torch.from_numpy(targets)
    assert torch.equal(curve.product(columns, columns), columns.double().T @ columns.double())
    eye = Curvature(torch.eye(3000), 3000, 0.0)  # the same, but row by row
    assert (rounded([Rounding(eye, targets, rule)])[0] == rule.nearest(targets, 1.0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_and_pivots(dtype: torch.dtype) -> None:
    H = moment(60).to(dtype)
    curve = Curvature(H, 60, 0.1)
    exact = damped(H.double())
    left, right = torch.from_numpy(targets_of(60, 3)), torch.from_numpy(targets_of(60, 2, seed=1))
    assert np.allclose(curve.product(left, right), left.double().numpy().T @ exact @ right.double().numpy())
    # Determinant by determinant: what remains of a row is what it adds.
    ordered = exact[np.ix_(curve.order, curve.order)]
    logs = [0.0, *(float(np.linalg.slogdet(ordered[:size, :size])[1]) for size in range(1, 61))]
    assert np.allclose(np.log(curve.pivots), np.diff(logs), atol=1e-3)
    assert curve.pivot == pytest.approx(np.exp(logs[-1] / 60), rel=1e-3)


@pytest.mark.parametrize("damping", [1e-4, 1e-5, 1e-6, 1e-7, 1e-9])
def test_ill_conditioned_moments(damping: float) -> None:
    """Where float32 has too few digits left, float64 decides."""
    H = moment(80, rank=20)
    logs = np.linalg.slogdet(damped(H, damping))[1]
    curve = Curvature(H, 80, damping)
    assert curve.pivot == pytest.approx(np.exp(logs / 80), rel=2e-3)
    assert np.isfinite(rounded([Rounding(curve, targets_of(80, 4), priced(4)[0])])[0]).all()


def test_moments_that_are_none() -> None:
    with pytest.raises(ValueError, match="more damping"):
        Curvature(moment(80, rank=20), 80, 0.0)
    with pytest.raises(ValueError, match="more damping"):
        Curvature(-torch.eye(5), 5, 0.1)


def test_a_moment_is_left_as_it_was() -> None:
    H = moment(20)
    before = H.clone()
    curve = Curvature(H, 20, 0.1)
    rounded([Rounding(curve, targets_of(20, 3), free(3))])
    assert torch.equal(H, before)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_triangle_is_refused_for_the_digits_it_loses_not_for_its_scale(scale: float) -> None:
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    moment = scale * (root @ root.T + torch.eye(6))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    triangle = _triangle(moment, order, 0.0, ENOUGH)
    assert triangle is not None
    torch.testing.assert_close(triangle.T @ triangle, moment[order[:, None], order], rtol=1e-4, atol=1e-5 * scale)
    # A control: of the last element of this one next to nothing is left.
    nearly_one = scale * torch.tensor([[1.0, 1 - 1e-6], [1 - 1e-6, 1.0]])
    assert _triangle(nearly_one, torch.arange(2), 0.0, ENOUGH) is None
