"""Coded factors come back, and damage to them is found."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from surgery.codec.entropy import LARGEST
from surgery.codec.factors import CodedFactors, code_bits, decode_factors, encode_factors, grid_of, rounded_scales

Shape = tuple[int, int, int]
SHAPES = [(30, 20, 3), (7, 50, 0), (1, 1, 1), (40, 9, 12), (5, 5, 0), (64, 33, 2)]


def factors(shapes: list[Shape], fineness: int = 6, seed: int = 0) -> list[CodedFactors]:
    """Integers of falling widths, and scales over many octaves."""
    rng = np.random.default_rng(seed)
    layers = []
    for height, width, rank in shapes:
        widths = np.geomspace(40, 0.4, rank) if rank else np.zeros(0)
        B = np.rint(rng.standard_normal((height, rank)) * widths).astype(np.int16)
        A = np.rint(rng.standard_normal((rank, width)) * widths[:, None]).astype(np.int16)
        layers.append(CodedFactors(B, A, rounded_scales(np.exp(rng.normal(-8, 2, rank)), fineness)))
    return layers


def same(one: list[CodedFactors], other: list[CodedFactors]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.B, b.B) and np.array_equal(a.A, b.A) and np.array_equal(a.s, b.s)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("shapes", [[], [(4, 5, 0)], [(1, 1, 1)], [(3, 4, 9)], SHAPES, SHAPES[::-1]])
@pytest.mark.parametrize("fineness", [0, 3, 9])
def test_round_trip(shapes: list[Shape], fineness: int) -> None:
    layers = factors(shapes, fineness)
    data = encode_factors(layers, fineness)
    found = decode_factors(data, shapes)
    assert data.dtype == np.uint8 and same(found, layers)
    for layer, (height, width, rank) in zip(found, shapes, strict=True):
        assert layer.B.dtype == layer.A.dtype == np.int16 and layer.rank == rank
        assert layer.B.shape == (height, rank) and layer.A.shape == (rank, width)
    # The data without its last number is other data: same() would see it.
    if any(layer.rank for layer in layers):
        layers[[layer.rank > 0 for layer in layers].index(True)].A[0, -1] ^= 1
        assert not same(found, layers)


def test_codes_of_all_sizes() -> None:
    B = np.array([[LARGEST, 0], [-LARGEST, 0], [5, 0]], dtype=np.int16)
    layer = CodedFactors(B, np.zeros((2, 4), np.int16), np.array([2.0**-63, 2.0**63]))
    assert same(decode_factors(encode_factors([layer], 0), [(3, 4, 2)]), [layer])


def test_factors_are_what_is_coded() -> None:
    layer = factors([(30, 20, 4)])[0]
    B, A = layer.factors(torch.float64)
    exact = sum(layer.s[k] * np.outer(layer.B[:, k].astype(float), layer.A[k].astype(float)) for k in range(4))
    assert np.allclose((B @ A).numpy(), exact, rtol=1e-12)
    assert layer.factors()[0].dtype == torch.float32


def test_size_is_what_the_columns_are_said_to_take() -> None:
    shapes = [(2000, 1000, 8)] * 3
    layers = factors(shapes)
    said = sum(code_bits(layer.B)[1].sum() + code_bits(layer.A.T)[1].sum() for layer in layers) / 8
    taken = encode_factors(layers, 6).size
    assert said < taken < 1.005 * said + 24 * 3 + 40
    # Control: numbers of one width for all would take more.
    classes, bits = code_bits(np.concatenate([layer.B for layer in layers]).reshape(-1, 1))
    assert len(classes) == 1 and bits.sum() > 1.1 * sum(code_bits(layer.B)[1].sum() for layer in layers)


def test_scales_off_the_grid_are_refused() -> None:
    layer = factors([(4, 4, 1)])[0]
    for s, message in ((1.01, "not on their grid"), (2.0**64, "too large or too small"), (2.0**-64, "too large or")):
        with pytest.raises(ValueError, match=message):
            encode_factors([CodedFactors(layer.B, layer.A, np.array([s]))], 3)
    for fineness in (-1, 10):
        with pytest.raises(ValueError, match="not on their grid"):
            encode_factors([CodedFactors(layer.B, layer.A, np.ones(1))], fineness)


@pytest.mark.parametrize("fineness", range(10))
def test_scales_are_rounded_to_a_grid_that_is_found_again(fineness: int) -> None:
    s = np.exp(np.random.default_rng(0).normal(-5, 3, 200))
    rounded = rounded_scales(s, fineness)
    assert np.abs(np.log2(rounded / s)).max() <= 0.5 / 2**fineness + 1e-9
    assert grid_of(rounded.astype(np.float32).astype(np.float64)) == fineness
    assert grid_of(rounded * (1 + 2e-6)) is None  # trained a little


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 2.0**70])
def test_scales_that_no_grid_has(bad: float) -> None:
    assert grid_of(np.array([1.0, bad])) is None


@pytest.fixture(name="coded", scope="module")
def _coded() -> NDArray[np.uint8]:
    return encode_factors(factors(SHAPES), 6)


def test_every_changed_byte_is_found(coded: NDArray[np.uint8]) -> None:
    for index in range(coded.size):
        for flip in (1, 0xFF):
            damaged = coded.copy()
            damaged[index] ^= flip
            with pytest.raises(ValueError, match="damaged"):
                decode_factors(damaged, SHAPES)


def test_cut_extended_and_random(coded: NDArray[np.uint8]) -> None:
    for size in range(0, coded.size, 7):
        with pytest.raises(ValueError, match="damaged or cut short"):
            decode_factors(coded[:size], SHAPES)
    rng = np.random.default_rng(0)
    for count in (1, 2, 500):
        with pytest.raises(ValueError, match="damaged"):
            decode_factors(np.concatenate([coded, np.zeros(count, np.uint8)]), SHAPES)
        with pytest.raises(ValueError, match="damaged"):
            decode_factors(rng.integers(0, 256, count, dtype=np.uint8), SHAPES)


def with_checksum(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """As if whoever made it had meant it."""
    body = data[4:].tobytes()
    return np.frombuffer(zlib.crc32(body).to_bytes(4, "little") + body, dtype=np.uint8)


def test_nonsense_with_a_good_checksum_does_no_harm(coded: NDArray[np.uint8]) -> None:
    rng = np.random.default_rng(1)
    refused, places = 0, range(4, coded.size, 5)
    for index in places:
        damaged = coded.copy()
        damaged[index] = rng.integers(0, 256)
        try:
            found = decode_factors(with_checksum(damaged), SHAPES)
        except ValueError:
            refused += 1
            continue
        assert [(layer.B.shape[0], layer.A.shape[1], layer.rank) for layer in found] == SHAPES
        assert all(np.isfinite(layer.s).all() for layer in found)
    assert refused > 0.9 * len(places)
    for fill in (0, 255):
        with pytest.raises(ValueError, match=r"damaged|cut short|not known"):
            decode_factors(with_checksum(np.full(400, fill, np.uint8)), SHAPES)


@pytest.mark.parametrize("shapes", [SHAPES[:-1], [*SHAPES, (5, 5, 1)], [(30, 20, 4), *SHAPES[1:]], [(10**9, 9, 9)]])
def test_other_shapes(coded: NDArray[np.uint8], shapes: list[Shape]) -> None:
    with pytest.raises(ValueError, match=r"damaged|cut short"):
        decode_factors(coded, shapes)
