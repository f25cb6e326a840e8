"""Gains on a layer's rows or columns as small integers, at the same squared error in each number as the factors.

A gain less one is a whole number of steps. Gains lie close together, mostly off one: coded is how they differ from
their mean, which stands beside them. An error e in the gain of a row costs `w e^2`, w being what the row's weights
count in the metric; all gains of a layer share one step, for which the mean of w counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgery.codec.entropy import LARGEST, WIDTHS, class_bits
from surgery.codec.factors import (
    LARGEST_CODE,
    LARGEST_EXPONENT,
    LIMITS,
    RANK_BITS,
    CodedFactors,
    code_bits,
    decode_factors,
    encode_factors,
    rounded_scales,
)
from surgery.codec.feedback import RoundingRule

__all__ = ["CodedGains", "GainVector", "decode_gains", "encode_gains"]

SMALLEST_STEP = 2.0 ** (1 - LARGEST_EXPONENT)
# The largest gain, in steps: differences from the mean take no more than the mean does.
MOST_STEPS = LARGEST // 2
# The mean is at least so many steps, where the gains differ by less.
MEAN_STEPS = 16


@dataclass(frozen=True)
class CodedGains:
    """Gains less one: `step * whole`.

    Attributes:
        whole: int32 `(n,)`, magnitudes up to `LARGEST`.
        step: positive, a power of two with an exponent from a grid.
        bits: what they take.
        error: what rounding costs in the metric.
    """

    whole: NDArray[np.int32]
    step: float
    bits: float = 0.0
    error: float = 0.0

    @property
    def apart(self) -> CodedFactors:
        """How the numbers differ from their mean, as a column, and that mean, as a row of one."""
        mean = int(np.rint(self.whole.mean())) if self.whole.size else 0
        codes = (self.whole - mean).clip(-LARGEST, LARGEST).astype(np.int16)
        return CodedFactors(codes[:, None], np.array([[mean]], np.int16), np.array([self.step]))


@dataclass(frozen=True)
class GainVector:
    """A layer's gains as they are to be coded.

    Attributes:
        values: the gains less one, float64 `(n,)`.
        weights: what a squared error of each costs, float64 `(n,)`.
        energy: what the gains' change of the weight counts, if it were lost.
        cross: its product with the layer's low-rank change, in the metric.
    """

    values: NDArray[np.float64]
    weights: NDArray[np.float64]
    energy: float
    cross: float = 0.0

    def plan(self, D: float, bits: int | None) -> tuple[float, float]:
        """Return what coding at an error D in each number takes, in bits, and what is lost; 0 bits if not worth it."""
        noise = max(D, self.variance * (0.0 if bits is None else LIMITS[bits][1]), 1e-300)
        spent = self.size * 0.5 * math.log2(1 + self.variance / noise) + RANK_BITS
        # Gains that are all alike are still rounded to whole numbers of steps.
        felt = self.variance + float(self.weights.mean()) * self.mean**2 / (12 * MEAN_STEPS**2)
        lost = self.size * noise * felt / (noise + felt)
        worth = self.energy - lost > 2 * math.log(2) * D * spent
        return (spent, lost) if worth else (0.0, self.energy)

    def code(self, D: float, bits: int | None, fineness: int) -> CodedGains | None:
        """Return the codes at an error D in each number; None where they are not worth their bits.

        Args:
            D: the squared error in each number.
            bits: 2, 3, 4 or 8 limits the codes; None does not.
            fineness: of the grid of steps.
        """
        weight, largest = float(self.weights.mean()), float(np.abs(self.values).max(initial=0))
        if not weight > 0 or not largest > 0:
            return None
        spread = math.sqrt(self.variance / weight)
        least = max(LIMITS[bits][0] * spread, largest / MOST_STEPS, SMALLEST_STEP)
        most = max(spread, abs(self.mean) / MEAN_STEPS)
        step = float(rounded_scales(np.array([max(min(math.sqrt(12 * D / weight), most), least)]), fineness)[0])
        offset = int(np.rint(self.mean / step))
        aims = (self.values / step - offset).astype(np.float32)[:, None]
        limit = LARGEST_CODE if bits is None else 2 ** (bits - 1) - 1
        reach = min(limit, 2 * int(np.abs(aims).max(initial=0)) + 7)
        kind = int(np.rint(4 * math.log2(max(float(np.sqrt((aims**2).mean())), 1e-9)) + 12).clip(0, WIDTHS - 1))
        price = 2 * math.log(2) * D
        rule = RoundingRule(np.array([weight * step**2]), price * class_bits(reach)[:, [kind]])
        whole = rule.nearest(aims, 1.0)[:, 0].astype(np.int32) + offset
        error = float((self.weights * (self.values - step * whole) ** 2).sum())
        coded = CodedGains(whole, step)
        spent = float(code_bits(coded.apart.B)[1].sum()) + RANK_BITS
        if self.energy - error <= price * spent:
            return None
        return CodedGains(whole, step, spent, error)

    @property
    def size(self) -> int:
        """How many gains there are."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The mean of the gains less one, each counting as its errors do."""
        total = float(self.weights.sum())
        return float((self.weights * self.values).sum()) / total if total > 0 else 0.0

    @property
    def variance(self) -> float:
        """What a gain would count, in the mean, if all were taken for their mean."""
        return float((self.weights * (self.values - self.mean) ** 2).mean()) if self.size else 0.0


def encode_gains(layers: Sequence[CodedGains], fineness: int) -> NDArray[np.uint8]:
    """Return the bytes of all layers' gains, in the layout of factors: a column of differences, a row with the mean.

    Raises:
        ValueError: a step is not on the grid, or out of its range.
    """
    return encode_factors([each.apart for each in layers], fineness)


def decode_gains(data: NDArray[np.uint8], sizes: Sequence[int]) -> list[CodedGains]:
    """Return the layers that `encode_gains` was given.

    Args:
        data: uint8.
        sizes: how many gains each layer has.

    Raises:
        ValueError: the data is not what `encode_gains` returns for these sizes.
    """
    found = decode_factors(data, [(size, 1, 1) for size in sizes])
    return [CodedGains(each.B[:, 0].astype(np.int32) + int(each.A[0, 0]), float(each.s[0])) for each in found]
