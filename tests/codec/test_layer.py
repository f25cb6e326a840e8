"""A layer as integers: its spectrum, its error and its bits against what is computed from dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from surgery.codec import layer as rounding
from surgery.codec.factors import CodedFactors, encode_factors
from surgery.codec.feedback import Curvature
from surgery.codec.layer import LIMITS, Coded, LayerCoder, Spectrum, code_layers, spectrum_of

DAMPING = 0.1
Moments = tuple[torch.Tensor | None, torch.Tensor | None]  # of the inputs, of the outputs


def layer_of(out: int, into: int, rank: int, seed: int = 0, power: float = 0.8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    falling = torch.arange(1, rank + 1) ** -power
    return torch.randn(out, rank, generator=generator) * falling, torch.randn(rank, into, generator=generator) * 0.1


def moment(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(3 * size, size, generator=generator).double()
    samples = samples @ torch.randn(size, size, generator=generator).double() * torch.arange(1, size + 1) ** -0.5
    return samples.T @ samples / len(samples)


def moments(out: int, into: int, kind: str, seed: int = 0) -> Moments:
    return (
        moment(into, seed) if kind in {"both", "inputs"} else None,
        moment(out, seed + 1) if kind in {"both", "outputs"} else None,
    )


def curves(layer: tuple[torch.Tensor, torch.Tensor], given: Moments) -> tuple[Curvature, Curvature]:
    return Curvature(given[0], layer[1].shape[1], DAMPING), Curvature(given[1], layer[0].shape[0], DAMPING)


def dense(H: torch.Tensor | None, size: int) -> torch.Tensor:
    eye = torch.eye(size, dtype=torch.float64)
    return eye if H is None else H + DAMPING * H.diagonal().mean() * eye


def loss(layer: tuple[torch.Tensor, torch.Tensor], coded: CodedFactors, given: Moments) -> float:
    """`tr(R^T F R C)` of what is lost, from the dense matrices."""
    R = layer[0].double() @ layer[1].double()
    C, F = dense(given[0], R.shape[1]), dense(given[1], R.shape[0])
    B, A = coded.factors(torch.float64)
    R = R - B @ A
    return float(((F @ R) * (R @ C)).sum())


def code(
    layer: tuple[torch.Tensor, torch.Tensor],
    given: Moments,
    share: float,
    rank: int | None = None,
    bits: int | None = None,
    restored: float = 1.0,
) -> tuple[Coded | None, Spectrum, float]:
    """Coded at the D that may lose about this share of the energy."""
    spectrum = spectrum_of(layer, curves(layer, given))
    D = share * float(spectrum.energy.sum()) / sum(spectrum.sizes) / len(spectrum.energy)
    kept = spectrum.plan(D, bits)[0] if rank is None else rank
    coder = LayerCoder(layer, spectrum, curves(layer, given), kept, D, bits=bits, restored=restored)
    return code_layers([coder])[0], spectrum, D


KINDS = ["none", "inputs", "outputs", "both"]
SHAPES = [(40, 90, 6), (90, 40, 12), (5, 60, 9), (64, 3, 4), (1, 1, 1), (33, 33, 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_is_that_of_the_dense_change_in_the_metric(shape: tuple[int, int, int], kind: str) -> None:
    out, into, rank = shape
    layer, given = layer_of(out, into, rank), moments(out, into, kind)
    spectrum = spectrum_of(layer, curves(layer, given))
    C, F = dense(given[0], into), dense(given[1], out)
    whitened = torch.linalg.cholesky(F).T @ layer[0].double() @ layer[1].double() @ torch.linalg.cholesky(C)
    wanted = torch.linalg.svdvals(whitened).square()[: min(shape)]
    assert np.allclose(spectrum.energy, wanted.numpy(), rtol=1e-6, atol=1e-9 * float(wanted[0]))
    assert spectrum.sizes == (out, into)
    # What B's numbers would count, if they were lost one by one: each column's own energy, weighed by the pivot.
    B = layer[0].double() @ spectrum.left
    assert np.allclose(
        spectrum.variance[0], spectrum.energy * (B.square().mean(0) * curves(layer, given)[1].pivot).numpy()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1e-4, 0.03])
def test_error_is_that_of_the_factors(shape: tuple[int, int, int], kind: str, share: float) -> None:
    layer, given = layer_of(*shape), moments(shape[0], shape[1], kind)
    coded, spectrum, _ = code(layer, given, share)
    assert coded is not None
    energy = float(spectrum.energy.sum())
    assert coded.error == pytest.approx(loss(layer, coded.factors, given), rel=1e-6, abs=1e-9 * energy)
    assert coded.error < 20 * share * energy
    # Control: the error of the same factors in another metric.
    if kind == "both" and min(shape) > 3:
        other = loss(layer, coded.factors, (given[0], None))
        assert coded.error != pytest.approx(other, rel=0.05)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_error_counts_the_directions_that_are_cut(rank: int) -> None:
    layer, given = layer_of(40, 90, 6), moments(40, 90, "both")
    coded, spectrum, _ = code(layer, given, 1e-5, rank, restored=0.0)
    assert coded is not None and coded.factors.rank == rank
    assert coded.error == pytest.approx(loss(layer, coded.factors, given), rel=1e-6)
    cut = float(spectrum.energy[rank:].sum())
    assert cut <= coded.error * (1 + 1e-6)
    assert coded.error < cut + 1e-3 * float(spectrum.energy.sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8, None])
def test_codes_keep_to_their_bits(bits: int | None) -> None:
    layer = layer_of(300, 200, 5)
    coded, spectrum, D = code(layer, (None, None), 1e-7, bits=bits, restored=0.0)
    assert coded is not None
    limit = rounding.LARGEST_CODE if bits is None else 2 ** (bits - 1) - 1
    largest = max(np.abs(coded.factors.B).max(), np.abs(coded.factors.A).max())
    assert limit / 3 < largest <= limit
    # On Gaussian columns the error is that of the best uniform quantiser with so many levels, of both factors.
    floor = LIMITS[bits][1]
    if bits is not None:
        assert 0.6 < coded.error / float(spectrum.energy.sum()) / (1 - (1 - floor) ** 2) < 1.1
        assert 0.6 < coded.error / spectrum.plan(D, bits)[2] < 1.1


def test_more_sweeps_help_and_the_best_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, given = layer_of(120, 80, 8), moments(120, 80, "both")
    costs = []
    for sweeps in (1, 3):
        monkeypatch.setattr(rounding, "SWEEPS", sweeps)
        coded, _, D = code(layer, given, 0.02)
        assert coded is not None
        costs.append(coded.error + 2 * math.log(2) * D * coded.bits)
    assert costs[1] < costs[0]


def test_restoring_takes_back_the_lost_projection() -> None:
    layer = layer_of(120, 80, 8)
    dW = layer[0].double() @ layer[1].double()
    projections, errors = [], []
    for restored in (0.0, 1.0):
        coded, _, _ = code(layer, (None, None), 0.2, restored=restored)
        assert coded is not None
        B, A = coded.factors.factors(torch.float64)
        projections.append(float((dW * (B @ A)).sum() / dW.square().sum()))
        errors.append(coded.error)
    assert projections[0] < 0.95 and 0.99 < projections[1] < 1.01
    assert errors[0] < errors[1]


def test_layers_together_are_as_they_are_alone() -> None:
    shapes = [(60, 40, 6), (60, 60, 3), (40, 60, 9), (25, 60, 1)]
    coders, alone = [], []
    for seed, shape in enumerate(shapes):
        layer, given = layer_of(*shape, seed=seed), moments(shape[0], shape[1], "both" if seed else "inputs", seed)
        spectrum = spectrum_of(layer, curves(layer, given))
        D = 0.02 * float(spectrum.energy.sum()) / sum(shape[:2]) / shape[2]
        for group in (coders, alone):
            group.append(LayerCoder(layer, spectrum, curves(layer, given), shape[2], D))
    for together, coder in zip(code_layers(coders), alone, strict=True):
        single = code_layers([coder])[0]
        assert together is not None and single is not None
        assert together.error == pytest.approx(single.error, rel=0.03)
        assert together.bits == pytest.approx(single.bits, rel=0.01)


def test_nothing_is_left_where_a_bit_costs_more_than_all() -> None:
    layer = layer_of(40, 30, 3)
    spectrum = spectrum_of(layer, curves(layer, (None, None)))
    D = 100 * float(spectrum.energy.sum())
    assert spectrum.plan(D, None)[0] == 0
    assert code_layers([LayerCoder(layer, spectrum, curves(layer, (None, None)), 2, D)]) == [None]
    zero = (torch.zeros(40, 3), layer[1])
    assert spectrum_of(zero, curves(zero, (None, None))).energy.size == 0


def test_deficient_factors_have_the_rank_of_their_product() -> None:
    B, A = layer_of(40, 30, 3)
    twice = torch.cat([B, B], 1), torch.cat([A, -0.5 * A])
    found = spectrum_of(twice, curves(twice, (None, None)))
    once = spectrum_of((B, A), curves((B, A), (None, None)))
    assert len(found.energy) == 3 and np.allclose(found.energy, once.energy * 0.25)
    coded, _, _ = code(twice, (None, None), 1e-5)
    assert coded is not None and coded.factors.rank == 3
    assert coded.error == pytest.approx(loss(twice, coded.factors, (None, None)), rel=1e-5)


def test_plan_is_what_comes_of_it() -> None:
    layer = layer_of(1500, 1000, 6, power=0.3)
    for share in (1e-4, 1e-2, 0.2):
        coded, spectrum, D = code(layer, (None, None), share, restored=0.0)
        rank, bits, lost = spectrum.plan(D, None)
        assert coded is not None and coded.factors.rank == rank
        # Uniform steps take about a quarter of a bit more than the least that theory allows.
        assert bits < coded.bits < bits + 0.3 * rank * 2500
        assert coded.error == pytest.approx(lost, rel=0.2)
        taken = encode_factors([coded.factors], 9).size
        assert 8 * taken == pytest.approx(coded.bits, rel=0.01, abs=400)
