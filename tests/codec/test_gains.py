"""Gains as integers: they come back, damage is found, and they take their share of a budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from surgery.codec.factors import decode_factors
from surgery.codec.gains import CodedGains, GainVector, decode_gains, encode_gains
from surgery.codec.model import DoesNotFit, Goal, compress

SIZES = (24, 7, 40)


def made(seed: int = 0) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]], list[GainVector]]:
    """Weights, factors, and gains on rows whose mean is off one."""
    generator = torch.Generator().manual_seed(seed)
    weights, layers, gains = [], [], []
    for size in SIZES:
        W = torch.randn(size, 16, generator=generator, dtype=torch.float64)
        B, A = (torch.randn(*shape, generator=generator) * 0.2 for shape in ((size, 2), (2, 16)))
        values = torch.randn(size, generator=generator, dtype=torch.float64) * 0.03 + 0.1
        gained = values[:, None] * W
        cross = float((gained * (B.double() @ A.double())).sum())
        gains.append(GainVector(values.numpy(), W.square().sum(1).numpy(), float(gained.square().sum()), cross))
        weights.append(W)
        layers.append((B, A))
    return weights, layers, gains


def loss(weights: list[torch.Tensor], gains: list[GainVector], layers: list, coded) -> tuple[list[float], list[float]]:  # type: ignore[no-untyped-def, type-arg]
    """Energy of each layer, and what the decoded bytes lack of it, by dense maths."""
    whole, lost = [], []
    factors = coded.layers
    if coded.data.size:
        shapes = [(W.shape[0], W.shape[1], each.rank) for W, each in zip(weights, coded.layers, strict=True)]
        factors = decode_factors(coded.data, shapes)
    read = iter(decode_gains(coded.gain_data, [len(each.whole) for each in coded.gains if each is not None]))
    for W, (B, A), own, low, kept in zip(weights, layers, gains, factors, coded.gains, strict=True):
        dW = torch.from_numpy(own.values)[:, None] * W + B.double() @ A.double()
        left, right = low.factors(torch.float64)
        found = left @ right
        if kept is not None:
            decoded = next(read)
            found = found + torch.from_numpy(decoded.whole * decoded.step)[:, None] * W
        whole.append(float(dW.square().sum()))
        lost.append(float((dW - found).square().sum()))
    return whole, lost


@pytest.mark.parametrize("whole", [[0, 0, 0], [5], [-30000, 30000], [16000, 16001, 15990], list(range(-40, 90))])
def test_what_was_coded_comes_back(whole: list[int]) -> None:
    layers = [CodedGains(np.array(whole, np.int32), 2.0**-7), CodedGains(np.array([3, -3], np.int32), 2.0**0.5)]
    back = decode_gains(encode_gains(layers, 3), [len(whole), 2])
    assert [each.whole.tolist() for each in back] == [whole, [3, -3]]
    assert [each.step for each in back] == [each.step for each in layers]


def test_damage_is_found() -> None:
    data = encode_gains([CodedGains(np.arange(50, dtype=np.int32), 0.125)], 0).copy()
    assert decode_gains(data, [50])[0].whole.tolist() == list(range(50))
    for place in range(0, data.size, 3):
        broken: NDArray[np.uint8] = data.copy()
        broken[place] ^= 0x10
        with pytest.raises(ValueError, match=r"damaged|cut short"):
            decode_gains(broken, [50])
    for sizes in ([49], [50, 1], []):
        with pytest.raises(ValueError, match=r"damaged|cut short"):
            decode_gains(data, sizes)


@pytest.mark.parametrize("size", [200, 350, 500])
def test_a_size_counts_gains_and_is_filled(size: int) -> None:
    weights, layers, gains = made()
    coded = compress(layers, Goal(size=size), gains=gains)
    assert coded.size == coded.data.size + coded.gain_data.size <= size and coded.size > 0.85 * size
    whole, lost = loss(weights, gains, layers, coded)
    # What coding reckons is what dense maths finds, but for the product of independent errors.
    assert sum(coded.errors) == pytest.approx(sum(lost), rel=0.1) and sum(coded.energies) == pytest.approx(sum(whole))


def test_less_error_takes_more_of_both() -> None:
    _, layers, gains = made()
    sizes = []
    for error in (0.2, 0.05, 0.01):
        coded = compress(layers, Goal(error=error), gains=gains)
        assert coded.relative_error <= error
        sizes.append((coded.data.size, coded.gain_data.size))
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


def test_gains_alone() -> None:
    weights, _, gains = made()
    layers = [(torch.zeros(W.shape[0], 0), torch.zeros(0, W.shape[1])) for W in weights]
    gains = [GainVector(each.values, each.weights, each.energy) for each in gains]
    coded = compress(layers, Goal(energy=0.999), gains=gains)
    assert coded.data.size == 0 and all(each is not None for each in coded.gains)
    whole, lost = loss(weights, gains, layers, coded)
    assert all(one <= 0.001 * all_ for one, all_ in zip(lost, whole, strict=True))
    with pytest.raises(DoesNotFit) as fault:
        compress(layers, Goal(size=20), gains=gains)
    assert compress(layers, Goal(size=fault.value.enough), gains=gains).size <= fault.value.enough


def test_equal_gains_cost_next_to_nothing() -> None:
    values = np.full(1000, 0.25)
    own = GainVector(values, np.ones(1000), float((values**2).sum()))
    coded = compress([(torch.zeros(1000, 0), torch.zeros(0, 4))], Goal(error=1e-3), gains=[own])
    assert coded.size < 80 and coded.relative_error < 1e-3


def test_without_gains_the_bytes_are_the_same() -> None:
    _, layers, _ = made()
    one, two = (compress(layers, Goal(size=500), gains=each) for each in (None, [None] * len(layers)))
    assert np.array_equal(one.data, two.data) and not two.gain_data.size
