"""One layer's low-rank weight change as integers, at a given error in each number.

That error, D, sets the step of every column, `D = pivot * step^2 / 12`, so that strong directions get many bits and
weak ones few; the price of a bit, `2 ln(2) D`, at which rounding trades error for bits; and which directions are worth
their bits at all (reverse water-filling). Then, in turn, each factor is the best one for the other as it is rounded, by
a small linear system, and is rounded itself, with feedback of errors and with the price of bits.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.codec.entropy import WIDTHS, class_bits
from surgery.codec.factors import (
    LARGEST_CODE,
    LARGEST_EXPONENT,
    LIMITS,
    RANK_BITS,
    CodedFactors,
    code_bits,
    rounded_scales,
)
from surgery.codec.feedback import Curvature, Integers, Rounding, RoundingRule, rounded
from surgery.codec.gains import CodedGains, GainVector
from surgery.linalg.metric import metric_svd

__all__ = ["LIMITS", "Coded", "Factors", "LayerCoder", "Spectrum", "code_layers", "spectrum_of"]

Factors = tuple[torch.Tensor, torch.Tensor]  # B (out, r), A (r, in)
Curves = tuple[Curvature, Curvature]  # of the inputs, of the outputs
Matrix = NDArray[np.float64]

SWEEPS = 3
MOST_RESTORED = 1.5
SMALLEST_SCALE = 2.0 ** (1 - LARGEST_EXPONENT)


@dataclass(frozen=True)
class Spectrum:
    """What the search knows of a layer between passes.

    Attributes:
        left, right: the singular directions in terms of the factors, `(r, k)` and `(k, r)`.
        energy: squared singular values `(k,)`.
        variance: of the numbers of B's columns and A's rows, what they would count if they were all lost, `(2, k)`.
        sizes: out and in.
        gains: the layer's, if it has any.
    """

    left: torch.Tensor
    right: torch.Tensor
    energy: Matrix
    variance: Matrix
    sizes: tuple[int, int]
    gains: GainVector | None = None

    @property
    def whole(self) -> float:
        """The energy of the layer's change."""
        of_factors = float(self.energy.sum())
        return of_factors if self.gains is None else max(of_factors + self.gains.energy + 2 * self.gains.cross, 0.0)

    @property
    def least(self) -> float:
        """The smallest variance of the leading direction's numbers, and of the gains; 0 for a change of zero."""
        found = [float(self.variance[:, 0].min())] if self.energy.size else []
        found += [self.gains.variance] if self.gains is not None and self.gains.variance > 0 else []
        return min(found, default=0.0)

    @property
    def largest(self) -> float:
        """The energy of the leading direction, or of the gains; 0 for a change of zero."""
        found = float(self.energy[0]) if self.energy.size else 0.0
        return found if self.gains is None else max(found, self.gains.energy)

    def plan(self, D: float, bits: int | None) -> tuple[int, float, float]:
        """For an error D in each number: how many ranks are worth their bits, what those take, and what is lost; gains,
        if any, included.
        """
        floor = 0.0 if bits is None else LIMITS[bits][1]
        numbers = np.array(self.sizes)[:, None]
        noise = np.maximum(D, self.variance * floor)
        rate = 0.5 * np.log2(1 + self.variance / noise)
        lost = (numbers * noise * self.variance / (noise + self.variance)).sum(0)
        spent = (numbers * rate).sum(0) + RANK_BITS
        worth = self.energy - lost > 2 * math.log(2) * D * spent
        rank = int(np.logical_and.accumulate(worth).sum())
        taken, left = float(spent[:rank].sum()), float(lost[:rank].sum() + self.energy[rank:].sum())
        if self.gains is None:
            return rank, taken, left
        more, beside = self.gains.plan(D, bits)
        return (rank, taken + more, left + beside) if rank or more else (0, 0.0, self.whole)


@dataclass(frozen=True)
class Coded:
    """A layer's factors and gains, what they take (bits), and the error in the metric."""

    factors: CodedFactors
    bits: float
    error: float
    gains: CodedGains | None = None

    @property
    def kept(self) -> bool:
        """Whether anything is left of the layer's change."""
        return bool(self.factors.rank) or self.gains is not None


def spectrum_of(layer: Factors, curves: Curves, gains: GainVector | None = None) -> Spectrum:
    """Singular values and directions of a layer's change in the metric."""
    B, A = (factor.double() for factor in layer)
    inputs, outputs = curves
    if not A.shape[0]:
        nothing = torch.zeros(0, 0, dtype=torch.float64)
        return Spectrum(nothing, nothing, np.zeros(0), np.zeros((2, 0)), (B.shape[0], A.shape[1]), gains)
    svd = metric_svd(B, A, outputs.product(B, B), inputs.product(A.T, A.T))
    energy = svd.S.square().numpy()
    sides = (
        (B @ svd.left).square().mean(0).numpy() * outputs.pivot,
        (svd.right @ A).square().mean(1).numpy() * inputs.pivot,
    )
    return Spectrum(svd.left, svd.right, energy, energy * np.stack(sides), (B.shape[0], A.shape[1]), gains)


def code_layers(coders: Sequence[LayerCoder]) -> list[Coded | None]:
    """Code several layers, rounding them side by side.

    Returns:
        Of each layer the sweep that cost least in error and bits; None if nothing but zeros is left.
    """
    results: list[Coded | None] = [None] * len(coders)
    running = [(index, coder.sweeps()) for index, coder in enumerate(coders)]
    answers: list[Integers | None] = [None] * len(coders)
    while running:
        waiting, tasks = [], []
        for (index, sweeps), answer in zip(running, answers, strict=True):
            try:
                tasks.append(sweeps.send(answer))
                waiting.append((index, sweeps))
            except StopIteration as end:
                results[index] = end.value
        running, answers = waiting, list(rounded(tasks))
    return results


class LayerCoder:
    """One layer at one D.

    The change is `B A^T` with both factors scaled so that errors of B and of A count alike. In turn each factor is the
    best one for the other as it is rounded (a small linear system), and is rounded itself.

    Args:
        layer: `B (out, r)` and `A (r, in)`.
        spectrum: of this layer, from `spectrum_of`.
        curves: the moments of the inputs and of the gradients at the outputs.
        rank: how many of the leading directions, at least 1.
        D: squared error in each number.
        bits: limits the codes.
        fineness: how many scales there are to the octave, as a binary logarithm.
        restored: see `surgery.codec.model.compress`.
    """

    def __init__(
        self,
        layer: Factors,
        spectrum: Spectrum,
        curves: Curves,
        rank: int,
        D: float,
        *,
        bits: int | None = None,
        fineness: int = 9,
        restored: float = 1.0,
    ) -> None:
        inputs, outputs = curves
        root = torch.from_numpy(spectrum.energy**0.25)
        B = layer[0].double() @ (spectrum.left * root)
        A = layer[1].double().T @ (spectrum.right.T * root)
        self.energy, self.price = float(spectrum.energy.sum()), 2 * math.log(2) * D
        self.fineness, self.restored = fineness, restored
        strength = spectrum.energy[:rank] ** 0.5
        least, _ = LIMITS[bits]
        self.largest = LARGEST_CODE if bits is None else 2 ** (bits - 1) - 1
        step_B, step_A = (
            np.maximum(
                np.sqrt(12 * D / (strength * curve.pivot)), least * columns[:, :rank].square().mean(0).sqrt().numpy()
            )
            for curve, columns in ((outputs, B), (inputs, A))
        )
        # The product is what is stored; ranks that are too weak for that are left out.
        count = int(np.logical_and.accumulate(step_B * step_A > SMALLEST_SCALE).sum())
        step_B, step_A = step_B[:count], step_A[:count]
        self.B_side = _Side(outputs, B, step_B)
        self.A_side = _Side(inputs, A, rounded_scales(step_B * step_A, fineness) / step_B)

    def sweeps(self) -> Generator[Rounding, Integers | None, Coded | None]:
        """Asks for roundings, and returns the best sweep."""
        best, least = None, math.inf
        B, A = self.B_side, self.A_side
        for _ in range(SWEEPS):
            for side, other in ((B, A), (A, B)):
                codes = yield self._task(side, other)
                assert codes is not None
                kept = side.take(codes)
                if not kept.any():
                    return best
                other.keep(kept)
            coded = self._coded()
            cost = coded.error + self.price * coded.bits
            if cost < least:
                best, least = coded, cost
        return best

    def _task(self, side: _Side, other: _Side) -> Rounding:
        """Round what is best for the other factor as it is."""
        # Of the leading directions alone: what little of the others could be had takes more bits than it is worth.
        targets = side.whole[:, : side.leading]
        if other.codes is not None:
            targets = targets @ (other.cross[: side.leading] @ _inverse(other.gram))
        aims = (targets.numpy() / side.steps).astype(np.float32)
        classes = side.classes
        if classes is None:
            deviation = np.sqrt((aims**2).mean(0)).clip(1e-9)
            classes = np.rint(4 * np.log2(deviation) + 12).clip(0, WIDTHS - 1).astype(np.uint8)
        reach = min(self.largest, 2 * int(np.abs(aims).max(initial=0)) + 7)
        weights = other.gram.diagonal().numpy() * side.steps**2
        return Rounding(side.curve, aims, RoundingRule(weights, self.price * class_bits(reach)[:, classes]))

    def _coded(self) -> Coded:
        """The scales, and the error with them."""
        B, A = self.B_side, self.A_side
        assert B.codes is not None and A.codes is not None
        s = B.steps * A.steps
        # Shares of the ranks in what the whole and the coded change have in common, and in the coded one's energy.
        cross, own = (B.cross * A.cross).sum(0).numpy() / s, (B.gram * A.gram).numpy() / s / s[:, None]
        projection = float(cross @ s)
        if projection > 0:
            gain = min(self.energy / projection, MOST_RESTORED) ** self.restored
            s = rounded_scales(s * gain, self.fineness)
        error = max(self.energy - 2 * float(cross @ s) + float(s @ own @ s), 0.0)
        factors = CodedFactors(B.codes.astype(np.int16), A.codes.T.astype(np.int16), s)
        return Coded(factors, float(B.bits.sum() + A.bits.sum()) + RANK_BITS * len(s), error)


class _Side:
    """One factor, whole and as it is rounded.

    Attributes:
        curve: how its errors count.
        whole: all its directions, float64 `(n, k)`.
        leading: how many of them are to be coded.
        steps: `(r,)`, as codes and all below for those that are left.
        codes: float32 `(n, r)`; None before they are rounded: then the whole factor stands for them.
        classes, bits: of the codes' columns, `(r,)`.
        cross: `whole^T H rounded`, `(k, r)`.
        gram: `rounded^T H rounded`, `(r, r)`.
    """

    def __init__(self, curve: Curvature, whole: torch.Tensor, steps: Matrix) -> None:
        self.curve, self.whole, self.steps, self.leading = curve, whole, steps, len(steps)
        self.codes: Integers | None = None
        self.classes: NDArray[np.uint8] | None = None
        self.bits: Matrix = np.zeros(0)
        self.cross = curve.product(whole, whole[:, : len(steps)])
        self.gram = self.cross[: len(steps)]

    def take(self, codes: Integers) -> NDArray[np.bool_]:
        """Take codes; ranks that have none but zeros are left out.

        Returns:
            Which ranks are left, `(r,)`.
        """
        kept = np.asarray(codes.any(0))
        self.codes, self.steps = codes[:, kept], self.steps[kept]
        self.classes, self.bits = code_bits(self.codes.astype(np.int16))
        columns = torch.from_numpy(self.codes * self.steps)
        weighed = self.curve.times(columns)
        self.cross, self.gram = self.whole.T @ weighed, columns.T @ weighed
        return kept

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """Leave out ranks that the other factor leaves out."""
        if kept.all():
            return
        chosen = torch.from_numpy(np.flatnonzero(kept))
        self.steps = self.steps[kept]
        self.gram = self.gram[chosen][:, chosen]
        self.cross = self.cross[:, chosen]
        if self.codes is not None and self.classes is not None:
            self.codes, self.classes, self.bits = self.codes[:, kept], self.classes[kept], self.bits[kept]


def _inverse(G: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(G, rtol=1e-9, hermitian=True)
