"""A whole model's low-rank weight changes in a given number of bytes.

The error of a layer is `tr(R^T F R C)` for what R its change loses, with the second moments C of its inputs and F of
the gradients at its output; that of the model is the sum. One number, the squared error that coding may leave in each
coded number, rules ranks, bits and layers together (see `rounding`); it is searched for the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.linalg.coded import CodedFactors, encode_factors
from surgery.linalg.entropy import lanes_for
from surgery.linalg.feedback import Curvature
from surgery.linalg.rounding import LIMITS, Coded, Factors, code_layer, spectrum_of

__all__ = ["Compressed", "Metric", "Moment", "compress"]

Moment = torch.Tensor | None
# By layer, C (in, in) of the inputs and F (out, out) of the gradients at the output; None is the identity.
Metric = Callable[[int], tuple[Moment, Moment]]
# (layers done, layers to do)
Progress = Callable[[int, int], None]

PASSES = 6
SAMPLE = 16
# Two passes this close, as a share of the budget, are mixed layer by layer instead of searching on.
NEAR = 0.03
HEAD_BYTES = 28
# What classes cost by their tables, over what they cost by formula.
EXCESS = 1.0015
COARSEST, FINEST = 3, 9
# A scale's rounding may add this share of the error that there is anyway.
SCALE_SHARE = 0.02


@dataclass(frozen=True)
class Compressed:
    """What came of it.

    Attributes:
        data: all layers, as `decode_factors` reads them, uint8.
        layers: the layers' factors, of rank 0 where nothing was kept.
        errors: of each layer, `tr(R^T F R C)` with the damped moments.
        energies: of each layer, the same for the whole change.
        bits: of each layer, for codes and scales.
    """

    data: NDArray[np.uint8]
    layers: list[CodedFactors]
    errors: list[float]
    energies: list[float]
    bits: list[float]

    @property
    def relative_error(self) -> float:
        """Root of the share of the energy that is lost."""
        whole = sum(self.energies)
        return math.sqrt(sum(self.errors) / whole) if whole > 0 else 0.0


def compress(
    layers: Sequence[Factors],
    budget: int,
    *,
    bits: int | None = None,
    metric: Metric | None = None,
    damping: float = 0.1,
    restored: float = 1.0,
    progress: Progress | None = None,
) -> Compressed:
    """Code all layers so that the error is least and the bytes are no more than a budget.

    Nothing is random. Layers are worked on one at a time; of the metric, only r x r matrices outlive a layer.

    Args:
        layers: `B (out, r)` and `A (r, in)` of each, of any floating dtype, on the CPU.
        budget: bytes for all of it.
        bits: 2, 3, 4 or 8: limits codes to `2^bits - 1` values; None does not.
        metric: the moments of a layer by its number; asked for in every pass. None is the identity for all.
        damping: share of their mean diagonal that is added to the moments, against what a finite sample leaves out.
        restored: coding makes a change smaller, in all layers alike, which adds up over a model. Each layer is scaled
            up, so that this power of its lost projection on the original is restored; 0 leaves the least error.
        progress: called after each layer of a pass; how many passes it takes is not known before.

    Raises:
        ValueError: the budget does not even hold the description of an empty model, or `bits` is none of these.
    """
    if bits not in LIMITS:
        raise ValueError(f"codes have 2, 3, 4 or 8 bits, not {bits}")
    return _Search(layers, bits, metric or (lambda index: (None, None)), damping, restored, progress).fill(budget)


class _Search:
    """The search for D; its passes."""

    def __init__(
        self,
        layers: Sequence[Factors],
        bits: int | None,
        metric: Metric,
        damping: float,
        restored: float,
        progress: Progress | None,
    ) -> None:
        self.layers, self.bits, self.metric = layers, bits, metric
        self.damping, self.restored, self.progress = damping, restored, progress
        self.done, self.all = 0, range(len(layers))
        self.spectra = []
        for index in self.all:
            self.spectra.append(spectrum_of(layers[index], self._curvatures(index)))
            self._tell()

    def fill(self, budget: int) -> Compressed:
        """Code at one D after another, until two results lie close on either side of the budget; mix these two."""
        below, above, fineness = [self._nothing(index) for index in self.all], None, 0
        excess, goal = self._excess(budget), float(budget)
        for _ in range(PASSES):
            D = self._noise_for(goal / excess)
            grid = self._fineness(D)
            found = [self._coded(index, D, grid) for index in self.all]
            fineness, size = max(fineness, grid), _bytes(found)
            if size <= budget:
                below = found
            else:
                above = found
            full = size <= budget and (size > (1 - NEAR / 10) * budget or self._least() >= D)
            if full or (above is not None and _bytes(above) - _bytes(below) < NEAR * budget):
                break
            excess = size / self._planned(D)
            kept = any(layer.factors.rank for layer in below)
            goal = budget * (1 + NEAR / 5 if above is None else 1.0 if kept else 1 - NEAR / 5)
        return self._written(below, above or below, budget, fineness)

    def _written(self, below: list[Coded], above: list[Coded], budget: int, fineness: int) -> Compressed:
        """What is within the budget, with as many layers of what is beyond it as fit."""
        limit = budget
        while True:
            if _bytes(below) > limit:
                below, above = [self._nothing(index) for index in self.all], below
            layers = _exchanged(below, above, limit)
            data = encode_factors([layer.factors for layer in layers], fineness)
            if data.size <= budget:
                break
            if not any(layer.factors.rank for layer in layers):
                raise ValueError(f"{budget} bytes do not hold the description of an empty model, {data.size} bytes")
            limit -= data.size - budget
        return Compressed(
            data,
            [layer.factors for layer in layers],
            [layer.error for layer in layers],
            [float(spectrum.energy.sum()) for spectrum in self.spectra],
            [layer.bits for layer in layers],
        )

    def _coded(self, index: int, D: float, fineness: int) -> Coded:
        rank = self.spectra[index].plan(D, self.bits)[0]
        coded = None
        if rank:
            coded = code_layer(
                self.layers[index],
                self.spectra[index],
                self._curvatures(index),
                rank,
                D,
                bits=self.bits,
                fineness=fineness,
                restored=self.restored,
            )
        self._tell()
        return coded or self._nothing(index)

    def _nothing(self, index: int) -> Coded:
        height, width = self.spectra[index].sizes
        empty = CodedFactors(np.zeros((height, 0), np.int16), np.zeros((0, width), np.int16), np.zeros(0))
        return Coded(empty, 0.0, float(self.spectra[index].energy.sum()))

    def _curvatures(self, index: int) -> tuple[Curvature, Curvature]:
        """Of the inputs, and of the outputs."""
        B, A = self.layers[index]
        C, F = self.metric(index)
        return Curvature(C, A.shape[1], self.damping), Curvature(F, B.shape[0], self.damping)

    def _planned(self, D: float) -> float:
        """Bytes of the whole model, by the plan."""
        return _bytes([]) + sum(spectrum.plan(D, self.bits)[1] for spectrum in self.spectra) / 8

    def _least(self) -> float:
        """A D below which nothing changes any more."""
        return 1e-9 * min((float(s.variance[:, 0].min()) for s in self.spectra if s.energy.size), default=1.0)

    def _noise_for(self, size: float) -> float:
        """The D at which the plan takes so many bytes."""
        least = self._least()
        if self._planned(least) <= size:
            return least
        low = math.log(least)
        high = math.log(max((float(s.energy[0]) for s in self.spectra if s.energy.size), default=1.0))
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if self._planned(math.exp(middle)) <= size else (middle, high)
        return math.exp(high)

    def _excess(self, budget: int) -> float:
        """What layers take over what was planned, by some of them where there are many."""
        sample = self.all[:: max(len(self.all) // SAMPLE, 1)]
        if len(sample) == len(self.all):
            return 1.0
        D = self._noise_for(budget)
        planned = sum(self.spectra[index].plan(D, self.bits)[1] for index in sample)
        taken = sum(self._coded(index, D, FINEST).bits for index in sample)
        return taken / planned if taken else 1.0

    def _fineness(self, D: float) -> int:
        """How finely scales are rounded: as finely as their error is to be small beside the others."""
        whole = sum(float(spectrum.energy.sum()) for spectrum in self.spectra)
        lost = sum(spectrum.plan(D, self.bits)[2] for spectrum in self.spectra)
        if not 0 < lost <= whole:
            return FINEST
        step = math.sqrt(12 * SCALE_SHARE * lost / whole) / math.log(2)  # of a binary logarithm
        return min(max(math.ceil(-math.log2(step)), COARSEST), FINEST)

    def _tell(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, max(self.done, 3 * len(self.layers)))


def _bytes(layers: Sequence[Coded]) -> float:
    """What coding these layers takes, within a few bytes."""
    numbers = sum(layer.factors.B.size + layer.factors.A.size for layer in layers)
    return HEAD_BYTES + 4 * lanes_for(numbers) + EXCESS * sum(layer.bits for layer in layers) / 8


def _exchanged(below: list[Coded], above: list[Coded], limit: float) -> list[Coded]:
    """`below`, with layers of `above` where these gain most for their bytes, as far as the limit goes."""
    layers, room = list(below), limit - _bytes(below)
    gains = [(old.error - new.error, EXCESS * (new.bits - old.bits) / 8) for old, new in zip(below, above, strict=True)]
    order = sorted(range(len(layers)), key=lambda index: -gains[index][0] / max(gains[index][1], 1e-9))
    for index in order:
        gain, cost = gains[index]
        if gain > 0 and cost <= room:
            layers[index] = above[index]
            room -= cost
    return layers
