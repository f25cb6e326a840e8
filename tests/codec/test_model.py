"""A whole model in a budget: that it is met and used, and that what is left is the most that it can be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from benchmarks.prototype import uniform
from surgery.codec.factors import decode_factors
from surgery.codec.model import Compressed, DoesNotFit, Goal, Metric, compress
from tests.helpers.coded_models import Factors, in_bytes, layer_of, metric_of, model

DAMPING = 0.1


def losses(
    layers: list[Factors], found: list[Factors], metric: Metric | None = None
) -> tuple[list[float], list[float]]:
    """What is lost of each layer and what there was, from dense matrices."""
    lost, whole = [], []
    for index, ((B, A), (coded_B, coded_A)) in enumerate(zip(layers, found, strict=True)):
        W = B.double() @ A.double()
        R = W - coded_B.double() @ coded_A.double()
        C, F = metric(index) if metric else (None, None)
        C, F = (
            torch.eye(size).double() if H is None else H + DAMPING * H.diagonal().mean() * torch.eye(size).double()
            for H, size in ((C, W.shape[1]), (F, W.shape[0]))
        )
        lost.append(float(((F @ R) * (R @ C)).sum()))
        whole.append(float(((F @ W) * (W @ C)).sum()))
    return lost, whole


def relative(layers: list[Factors], found: list[Factors], metric: Metric | None = None) -> float:
    lost, whole = losses(layers, found, metric)
    return (sum(lost) / sum(whole)) ** 0.5


def factors_of(coded: Compressed) -> list[Factors]:
    return [layer.factors(torch.float64) for layer in coded.layers]


def check(layers: list[Factors], coded: Compressed, metric: Metric | None = None) -> None:
    """The data holds the layers, and the errors are theirs."""
    shapes = [(B.shape[0], A.shape[1], layer.rank) for (B, A), layer in zip(layers, coded.layers, strict=True)]
    for layer, found in zip(coded.layers, decode_factors(coded.data, shapes), strict=True):
        assert (
            np.array_equal(layer.B, found.B) and np.array_equal(layer.A, found.A) and np.array_equal(layer.s, found.s)
        )
    lost, whole = losses(layers, factors_of(coded), metric)
    scale = sum(whole)
    assert np.allclose(coded.energies, whole, rtol=1e-5, atol=1e-9 * scale)
    assert np.allclose(coded.errors, lost, rtol=1e-5, atol=1e-9 * scale)
    assert sum(coded.bits) / 8 == pytest.approx(coded.data.size, rel=0.03, abs=100)


@pytest.mark.parametrize("bits", [None, 4, 2])
@pytest.mark.parametrize("with_metric", [False, True])
def test_budgets_are_met_and_used(bits: int | None, with_metric: bool) -> None:
    layers = model()
    metric = metric_of(layers) if with_metric else None
    most = in_bytes(layers, 10**6, bits=bits, metric=metric).data.size
    errors = []
    for size in (300, 2100, 8000):
        coded = in_bytes(layers, size, bits=bits, metric=metric, restored=0.0)
        check(layers, coded, metric)
        assert coded.data.size <= size
        # With codes of few bits there comes a point where there is nothing more to spend bytes on.
        if size > 2048:
            assert coded.data.size >= 0.97 * min(size, most)
        errors.append(coded.relative_error)
    # Where nothing but a lower price is left to spend on few levels, the error may rise a little again.
    slack = 1.0 if bits is None else 1.07
    assert all(later <= slack * before for before, later in itertools.pairwise(errors)) and errors[-1] < 0.8 * errors[0]
    assert bits == 2 or errors[0] > 3 * errors[-1]


def test_all_that_there_is_fits_into_more_than_enough() -> None:
    layers = model(4)
    coded = in_bytes(layers, 10**6)
    check(layers, coded)
    assert coded.relative_error < 2e-3 and all(layer.rank == 8 for layer in coded.layers)


@pytest.mark.parametrize("with_metric", [False, True])
def test_odd_layers(with_metric: bool) -> None:
    """Zero, deficient, of more ranks than rows, of one row, of one column, in other dtypes, huge or tiny."""
    B, A = layer_of(30, 40, 4, 1)
    layers = [
        (torch.zeros(20, 4), layer_of(20, 30, 4, 0)[1]),
        (torch.cat([B, B], 1), torch.cat([A, A])),
        layer_of(5, 70, 12, 2),
        layer_of(70, 6, 12, 3),
        layer_of(1, 50, 3, 4),
        layer_of(50, 1, 3, 5),
        tuple(factor.bfloat16() for factor in layer_of(40, 40, 4, 6)),
        tuple(factor.double() for factor in layer_of(40, 40, 4, 7)),
        (B * 1e-6, A * 1e-6),
        (torch.zeros(8, 2), torch.zeros(2, 9)),
    ]
    metric = metric_of(layers) if with_metric else None
    for size in (500, 2100, 4000):
        coded = in_bytes(layers, size, metric=metric)
        check(layers, coded, metric)
        # In the end every number is as fine as it can be.
        assert 0.93 * min(size, 2800) < coded.data.size <= size
        assert coded.layers[0].rank == coded.layers[9].rank == 0
        assert all(layer.rank <= 6 for layer in coded.layers[:6])
    huge = [(B * 1e6, A * 1e3), (B * 1e6, A * 1e3)]
    check(huge, in_bytes(huge, 400))


def test_bfloat16_factors_are_coded_as_the_numbers_that_they_are() -> None:
    rough = [(B.bfloat16(), A.bfloat16()) for B, A in model(4)]
    exact = [(B.float(), A.float()) for B, A in rough]
    assert np.array_equal(in_bytes(rough, 1500).data, in_bytes(exact, 1500).data)


def test_identity_as_a_moment_is_no_moment() -> None:
    layers = model(8)
    free = in_bytes(layers, 3000)
    assert np.array_equal(in_bytes(layers, 3000, metric=lambda index: (None, None)).data, free.data)

    def eyes(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        B, A = layers[index]
        return torch.eye(A.shape[1]), torch.eye(B.shape[0])

    assert in_bytes(layers, 3000, metric=eyes).relative_error == pytest.approx(free.relative_error, rel=0.01)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_better_than_four_bits_for_all(power: float) -> None:
    layers = model(12, power)
    named = {str(index): layer for index, layer in enumerate(layers)}
    for size in (1500, 6000):
        found = uniform(named, size, 4)
        empty = [(B[:, :0], A[:0]) for B, A in layers]
        theirs = relative(layers, [found.get(str(index), empty[index]) for index in range(12)])
        ours = relative(layers, factors_of(in_bytes(layers, size, restored=0.0)))
        assert ours < 0.9 * theirs
        assert relative(layers, factors_of(in_bytes(layers, size, bits=4, restored=0.0))) < theirs


@pytest.mark.parametrize("size", [800, 2500, 8000])
def test_the_metric_is_what_is_minimised(size: int) -> None:
    layers = model()
    metric = metric_of(layers)
    coded, blind = in_bytes(layers, size, metric=metric), in_bytes(layers, size)
    error, control = (relative(layers, factors_of(each), metric) for each in (coded, blind))
    assert error < 0.8 * control
    # And the other way round.
    assert relative(layers, factors_of(blind)) < 0.9 * relative(layers, factors_of(coded))


@pytest.mark.parametrize("with_metric", [False, True])
def test_errors_are_kept_and_no_better_than_asked_for(with_metric: bool) -> None:
    layers = model()
    metric = metric_of(layers) if with_metric else None
    sizes = []
    for error in (0.02, 0.1, 0.5):
        coded = compress(layers, Goal(error=error), metric=metric)
        check(layers, coded, metric)
        assert 0.9 * error < relative(layers, factors_of(coded), metric) <= error
        sizes.append(coded.data.size)
    assert sizes == sorted(sizes, reverse=True)
    coded = compress(layers, Goal(energy=0.97), metric=metric)
    lost, whole = losses(layers, factors_of(coded), metric)
    shares = np.array(lost) / whole
    assert shares.max() <= 0.03 and shares.min() > 0.02
    assert all(layer.rank == 3 for layer in compress(layers, Goal(rank=3), metric=metric).layers)


def test_errors_that_few_bits_do_not_reach() -> None:
    with pytest.raises(ValueError, match="finest codes"):
        compress(model(3), Goal(error=0.01), bits=2)


@pytest.mark.parametrize("bits", [0, 1, 5, 16, 32])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"2, 3, 4 or 8 bits, not {bits}"):
        in_bytes(model(1), 1000, bits=bits)


def test_budgets_that_hold_nothing() -> None:
    layers = model(3)
    for size in (1, 20, 40):
        with pytest.raises(DoesNotFit) as caught:
            in_bytes(layers, size)
        enough = caught.value.enough
        assert size < enough < 500
        assert any(layer.rank for layer in in_bytes(layers, enough).layers)
    for nothing in ([], [(torch.zeros(5, 2), torch.zeros(2, 4))]):
        with pytest.raises(DoesNotFit) as caught:
            in_bytes(nothing, 1000)
        assert caught.value.enough == 0
