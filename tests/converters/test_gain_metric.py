"""What errors in gains cost, beside dense maths with second moments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from surgery.adapters.source import Change
from surgery.converters.budget import Budget
from surgery.converters.gain_metric import DAMPING, GainMetric
from surgery.deltas.operators import INPUTS, ROWS, Gain
from surgery.models.sites import Site
from surgery.passes.moments import Moments

HEIGHT, WIDTH = 6, 5


def moment(size: int, generator: torch.Generator) -> torch.Tensor:
    X = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    return X.T @ X / len(X)


def damped(C: torch.Tensor) -> torch.Tensor:
    return C + DAMPING * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)


@pytest.mark.parametrize("kind", [ROWS, INPUTS])
@pytest.mark.parametrize("with_data", [False, True])
def test_costs_are_those_of_dense_maths(kind: str, with_data: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(HEIGHT, WIDTH, generator=generator)
    B, A = torch.randn(HEIGHT, 2, generator=generator), torch.randn(2, WIDTH, generator=generator)
    values = torch.randn(WIDTH if kind == INPUTS else HEIGHT, generator=generator)
    C, F = moment(WIDTH, generator), moment(HEIGHT, generator)
    site = Site("m", "m", "m", None, HEIGHT, WIDTH)
    change = Change("m", B, A, site, gain=Gain.of_kind(kind, values, None, (HEIGHT, WIDTH)))
    source: Any = SimpleNamespace(base=SimpleNamespace(weight=lambda site: W))
    metric: Any = SimpleNamespace(full=lambda change: Moments(C, F)) if with_data else None
    found = GainMetric.of(source, [change], metric)
    assert found is not None
    vector = found.vectors[0]
    assert vector is not None
    left, right = (damped(F), damped(C)) if with_data else (torch.eye(HEIGHT).double(), torch.eye(WIDTH).double())

    def inner(P: torch.Tensor, Q: torch.Tensor) -> float:
        return float(torch.trace(P.T.double() @ left @ Q.double() @ right))

    def gained(g: torch.Tensor) -> torch.Tensor:
        return W * g if kind == INPUTS else g[:, None] * W

    units = torch.eye(len(values))
    assert vector.weights.tolist() == pytest.approx([inner(gained(unit), gained(unit)) for unit in units], rel=1e-5)
    assert vector.energy == pytest.approx(inner(gained(values), gained(values)), rel=1e-5)
    assert vector.cross == pytest.approx(inner(gained(values), B @ A), rel=1e-4)
    # What is left: half of the gains, and one rank.
    left_over = gained(values) / 2 + B[:, 1:] @ A[1:]
    whole = gained(values) + B @ A
    parts = {"m": (B[:, :1], A[:1], torch.ones(1))}
    share = inner(left_over, left_over) / inner(whole, whole)
    gains = {"m": (values / 2, 0.0)}
    assert found.excess(Budget(max_error=0.1), parts, gains) == pytest.approx(share / 0.01, rel=1e-4)
    assert found.excess(Budget(energy=0.9), parts, gains) == pytest.approx(share / 0.1, rel=1e-4)


def test_without_gains_there_is_none() -> None:
    site = Site("m", "m", "m", None, HEIGHT, WIDTH)
    source: Any = None
    assert GainMetric.of(source, [Change.none("m", site)], None) is None
