"""A whole model's low-rank weight changes in a given number of bytes, or at a given error.

The error of a layer is `tr(R^T F R C)` for what R its change loses, with the second moments C of its inputs and F of
the gradients at its output; that of the model is the sum. One number, the squared error that coding may leave in each
coded number, rules ranks, bits and layers together (see `rounding`); it is searched for the goal. Gains on a layer's
rows or columns, where it has any, are numbers like those of its factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from surgery.codec.entropy import lanes_for
from surgery.codec.factors import CodedFactors, encode_factors
from surgery.codec.gains import CodedGains, GainVector, encode_gains
from surgery.codec.layer import LIMITS, Coded, Factors, LayerCoder, Spectrum, code_layers, spectrum_of
from surgery.codec.workers import Metric, Moment, Workers

__all__ = ["Compressed", "DoesNotFit", "Goal", "Metric", "Moment", "compress"]

# (layers done, layers to do)
LayerProgress = Callable[[int, int], None]

PASSES = 6
MOST_PASSES = 12  # where an error is searched for
SAMPLE = 16
# Two passes this close, as a share of the budget, are mixed layer by layer instead of searching on.
NEAR = 0.03
RECKONING = 1e-4  # what the error of the factors in float32 may differ from the reckoned one
HEAD_BYTES = 32
# What classes cost by their tables, over what they cost by formula.
EXCESS = 1.0015
COARSEST, FINEST = 3, 9
# A scale's rounding may add this share of the error that there is anyway.
SCALE_SHARE = 0.02
# Where a search for what does fit begins.
SMALL = 64


@dataclass(frozen=True)
class Goal:
    """What coding is to reach: one of these, with as few bytes, or as little error, as that takes.

    Attributes:
        size: bytes of the coded data, at most.
        error: relative error over all layers together, at most; rounding included.
        energy: share of its energy that every layer keeps, at least; rounding included.
        rank: of every layer, as far as it has so many; nothing is saved on the codes.
    """

    size: int | None = None
    error: float | None = None
    energy: float | None = None
    rank: int | None = None


class DoesNotFit(ValueError):
    """A budget holds nothing of any layer.

    Attributes:
        enough: bytes that do hold something; 0 where there is no change to hold.
    """

    def __init__(self, enough: int) -> None:
        super().__init__(f"so few bytes hold nothing of any layer; {enough} do")
        self.enough = enough


@dataclass(frozen=True)
class Compressed:
    """What came of it.

    Attributes:
        data: all layers, as `decode_factors` reads them, uint8.
        layers: the layers' factors, of rank 0 where nothing was kept.
        errors: of each layer, `tr(R^T F R C)` with the damped moments.
        energies: of each layer, the same for the whole change.
        bits: of each layer, for codes and scales.
        gains: of each layer, None where it has none or they were not worth their bits; empty where no layer has any.
        gain_data: all of them, as `decode_gains` reads them, uint8; empty where there are none.
    """

    data: NDArray[np.uint8]
    layers: list[CodedFactors]
    errors: list[float]
    energies: list[float]
    bits: list[float]
    gains: list[CodedGains | None] = field(default_factory=list)
    gain_data: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))

    @property
    def size(self) -> int:
        """Bytes of the codes."""
        return int(self.data.size + self.gain_data.size)

    @property
    def relative_error(self) -> float:
        """Root of the share of the energy that is lost."""
        whole = sum(self.energies)
        return math.sqrt(sum(self.errors) / whole) if whole > 0 else 0.0


def compress(
    layers: Sequence[Factors],
    goal: Goal,
    *,
    bits: int | None = None,
    metric: Metric | None = None,
    damping: float = 0.1,
    restored: float = 1.0,
    gains: Sequence[GainVector | None] | None = None,
    progress: LayerProgress | None = None,
) -> Compressed:
    """Code all layers so that a goal is reached at the least cost in error, or in bytes.

    Nothing is random. Layers are worked on in as many threads as torch has, with one thread of the linear algebra's
    each. Of the metric about a GiB is in memory at a time, or, if that is more, the moments of one layer.

    Args:
        layers: `B (out, r)` and `A (r, in)` of each, of any floating dtype, on the CPU.
        goal: what to reach.
        bits: 2, 3, 4 or 8: limits codes to `2^bits - 1` values; None does not.
        metric: the moments of a layer by its number; asked for in every pass unless they were kept, for one layer at a
            time, though not always by the same thread. None is the identity for all.
        damping: share of their mean diagonal that is added to the moments, against what a finite sample leaves out.
        restored: coding makes a change smaller, in all layers alike, which adds up over a model. Each layer is scaled
            up, so that this power of its lost projection on the original is restored; 0 leaves the least error.
        gains: of each layer, None where it has none; their errors are taken to be independent of the factors'.
        progress: called for each layer of a pass that is done; how many passes it takes is not known before.

    Raises:
        DoesNotFit: the goal's size holds nothing.
        ValueError: codes of so few bits do not reach the goal, or `bits` is none of these.
    """
    if bits not in LIMITS:
        raise ValueError(f"codes have 2, 3, 4 or 8 bits, not {bits}")
    with Workers(layers, metric, damping) as workers:
        search = _Search(layers, bits, workers, restored, gains, progress)
        if goal.size is not None:
            return search.fill(goal.size)
        if goal.rank is not None:
            return search.at_rank(goal.rank)
        return search.keeping(goal.energy) if goal.energy is not None else search.within(goal.error or 0.0)


class _Search:
    """The search for D; its passes."""

    def __init__(
        self,
        layers: Sequence[Factors],
        bits: int | None,
        workers: Workers,
        restored: float,
        gains: Sequence[GainVector | None] | None,
        progress: LayerProgress | None,
    ) -> None:
        self.layers, self.bits, self.workers = layers, bits, workers
        self.restored, self.gains, self.progress = restored, gains, progress
        self.done, self.all = 0, range(len(layers))
        self.spectra: list[Spectrum] = []
        for spectrum in workers.map(self._spectrum, self.all):
            self.spectra.append(spectrum)
            self._tell()

    def _spectrum(self, index: int) -> Spectrum:
        gains = self.gains[index] if self.gains is not None else None
        return spectrum_of(self.layers[index], self.workers.curvatures(index), gains)

    def fill(self, budget: int) -> Compressed:
        """As little error as a budget allows.

        Raises:
            DoesNotFit: it holds nothing.
        """
        found = self._filled(budget)
        if found is not None:
            return found
        if self._whole == 0:
            raise DoesNotFit(0)
        enough = SMALL
        while (found := self._filled(enough)) is None or enough <= budget:
            enough *= 2
        raise DoesNotFit(found.size)

    def within(self, error: float) -> Compressed:
        """As few bytes as a relative error over all layers together allows."""
        share = error**2
        grid = self._fineness(share)
        return self._result(self._losing([list(self.all)], share, grid), grid)

    def keeping(self, energy: float) -> Compressed:
        """As few bytes as a share of its energy that every layer keeps allows."""
        share = 1 - energy
        grid = self._fineness(share)
        return self._result(self._losing([[index] for index in self.all], share, grid), grid)

    def at_rank(self, rank: int) -> Compressed:
        """The leading directions of every layer, as exactly as the codes can tell them."""
        return self._result(self._coded(dict.fromkeys(self.all, self._least()), FINEST, rank), FINEST)

    def _filled(self, budget: int) -> Compressed | None:
        """Code at one D after another, until one result fills the budget or two lie close on either side; mix these."""
        below, above, fineness = [self._nothing(index) for index in self.all], None, 0
        excess, goal, margin, drift = self._excess(budget), float(budget), NEAR / 5, 0.0
        for _ in range(PASSES):
            D = self._noise_for(goal / excess)
            grid = self._fineness(self._planned_loss(D))
            found = self._coded(dict.fromkeys(self.all, D), grid)
            fineness, size = max(fineness, grid), _bytes(found) + drift
            if size <= budget:
                made = self._result(found, fineness)
                drift += made.size - size
                size = made.size
                if budget >= size and (size > (1 - NEAR / 10) * budget or self._least() >= D):
                    return made if any(made.bits) else None
            if size <= budget:
                below = found
            else:
                above = found
            if above is not None and _bytes(above) - _bytes(below) < NEAR * budget:
                break
            excess = size / self._planned(D)
            # What is still to be found lies on the other side of the budget, if not by so much then by twice as much.
            kept = any(layer.kept for layer in below)
            goal = budget * (1 + margin if above is None else 1.0 if kept else 1 - margin)
            margin *= 2
        return self._mixed(below, above or below, budget, drift, fineness)

    def _mixed(
        self, below: list[Coded], above: list[Coded], budget: int, drift: float, fineness: int
    ) -> Compressed | None:
        """What is within the budget, with as many layers of what is beyond it as fit."""
        limit = budget - drift
        while True:
            layers = _exchanged(below, above, limit)
            if not any(layer.kept for layer in layers):
                return None
            made = self._result(layers, fineness)
            if made.size <= budget:
                return made
            limit -= made.size - budget

    def _losing(self, groups: Sequence[Sequence[int]], share: float, grid: int) -> list[Coded]:
        """All layers in few bytes, each group of them losing no more than this share of its energy.

        Raises:
            ValueError: the finest codes lose more.
        """
        searches = [_Loss([self.spectra[index] for index in group], share) for group in groups]
        waiting = [pair for pair in zip(groups, searches, strict=True) if pair[0]]
        for _ in range(MOST_PASSES):
            noises = {}
            for group, search in waiting:
                D = self._boundary(search.plans_more(self.bits))[0]
                noises.update(dict.fromkeys(group, D))
            found = dict(zip(noises, self._coded(noises, grid), strict=True))
            least = self._least()
            for group, search in waiting:
                search.take([found[index] for index in group], least >= noises[group[0]])
            waiting = [(group, search) for group, search in waiting if not search.done]
            if not waiting:
                break
        results: dict[int, Coded] = {}
        for group, search in zip(groups, searches, strict=True):
            if search.best is None and group:
                raise ValueError("the finest codes there are lose more than that")
            results.update(zip(group, search.best or [], strict=True))
        return [results[index] for index in self.all]

    def _result(self, layers: list[Coded], fineness: int) -> Compressed:
        factors, kept = (
            [layer.factors for layer in layers],
            [layer.gains for layer in layers if layer.gains is not None],
        )
        empty = bool(kept) and not any(each.rank for each in factors)
        return Compressed(
            np.zeros(0, np.uint8) if empty else encode_factors(factors, fineness),
            factors,
            [layer.error for layer in layers],
            [spectrum.whole for spectrum in self.spectra],
            [layer.bits for layer in layers],
            [layer.gains for layer in layers] if self.gains is not None else [],
            encode_gains(kept, fineness) if kept else np.zeros(0, np.uint8),
        )

    @property
    def _whole(self) -> float:
        """Energy of all layers."""
        return sum(spectrum.whole for spectrum in self.spectra)

    def _coded(self, noises: Mapping[int, float], fineness: int, rank: int | None = None) -> list[Coded]:
        """Layers, each at its own D; with as many ranks as it is worth there, unless they are given."""

        def coded(group: Sequence[int]) -> list[Coded]:
            coders = {}
            for index in group:
                spectrum, D = self.spectra[index], noises[index]
                kept = spectrum.plan(D, self.bits)[0] if rank is None else min(rank, len(spectrum.energy))
                if kept:
                    coders[index] = LayerCoder(
                        self.layers[index],
                        spectrum,
                        self.workers.curvatures(index),
                        kept,
                        D,
                        bits=self.bits,
                        fineness=fineness,
                        restored=self.restored,
                    )
            found = dict(zip(coders, code_layers(list(coders.values())), strict=True))
            return [self._with_gains(index, found.get(index), noises[index], fineness) for index in group]

        results: list[Coded] = []
        for layers in self.workers.map(coded, self.workers.groups(list(noises))):
            results += layers
            for _ in layers:
                self._tell()
        return results

    def _nothing(self, index: int) -> Coded:
        height, width = self.spectra[index].sizes
        empty = CodedFactors(np.zeros((height, 0), np.int16), np.zeros((0, width), np.int16), np.zeros(0))
        return Coded(empty, 0.0, self.spectra[index].whole)

    def _with_gains(self, index: int, coded: Coded | None, D: float, fineness: int) -> Coded:
        """A layer's factors, None for none, with its gains at the same D."""
        spectrum = self.spectra[index]
        if spectrum.gains is None:
            return coded or self._nothing(index)
        gains = spectrum.gains.code(D, self.bits, fineness)
        if coded is None and gains is None:
            return self._nothing(index)
        base = coded or Coded(self._nothing(index).factors, 0.0, float(spectrum.energy.sum()))
        if gains is None:
            return Coded(base.factors, base.bits, base.error + spectrum.gains.energy)
        return Coded(base.factors, base.bits + gains.bits, base.error + gains.error, gains)

    def _planned(self, D: float) -> float:
        """Bytes of the whole model, by the plan."""
        return _bytes([]) + sum(spectrum.plan(D, self.bits)[1] for spectrum in self.spectra) / 8

    def _least(self) -> float:
        """A D below which nothing changes any more."""
        return 1e-9 * min((s.least for s in self.spectra if s.least > 0), default=1.0)

    def _planned_loss(self, D: float) -> float:
        """Share of the whole energy that is lost, by the plan."""
        lost = sum(spectrum.plan(D, self.bits)[2] for spectrum in self.spectra)
        return lost / self._whole if self._whole > 0 else 0.0

    def _noise_for(self, size: float) -> float:
        """The least D at which the plan takes no more bytes."""
        return self._boundary(lambda D: self._planned(D) <= size)[1]

    def _boundary(self, holds: Callable[[float], bool]) -> tuple[float, float]:
        """Two values of D close to each other: what does not hold at the first holds at the second, and above."""
        least = self._least()
        if holds(least):
            return least, least
        low = math.log(least)
        high = math.log(max((s.largest for s in self.spectra if s.largest > 0), default=1.0))
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if holds(math.exp(middle)) else (middle, high)
        return math.exp(low), math.exp(high)

    def _excess(self, budget: int) -> float:
        """What layers take over what was planned, by some of them where there are many."""
        sample = self.all[:: max(len(self.all) // SAMPLE, 1)]
        if len(sample) == len(self.all):
            return 1.0
        D = self._noise_for(budget)
        planned = sum(self.spectra[index].plan(D, self.bits)[1] for index in sample)
        taken = sum(layer.bits for layer in self._coded(dict.fromkeys(sample, D), FINEST))
        return taken / planned if taken else 1.0

    def _fineness(self, share: float) -> int:
        """How finely scales are rounded: as finely as their error is to be small beside a loss of this share."""
        if not 0 < share <= 1:
            return FINEST
        step = math.sqrt(12 * SCALE_SHARE * share) / math.log(2)  # of a binary logarithm
        return min(max(math.ceil(-math.log2(step)), COARSEST), FINEST)

    def _tell(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, max(self.done, 3 * len(self.layers)))


class _Loss:
    """The search for the D at which layers lose a share of their energy.

    Attributes:
        best: of what lost no more than that, what takes the fewest bytes.
        done: whether there is no more to be found.
    """

    def __init__(self, spectra: Sequence[Spectrum], share: float) -> None:
        self.spectra = spectra
        self.allowed = share * sum(spectrum.whole for spectrum in spectra) * (1 - RECKONING)
        self.best: list[Coded] | None = None
        self.done = False
        # Planned losses: to try, that was within what is allowed, that was beyond.
        self._goal, self._within, self._beyond = self.allowed, 0.0, math.inf

    def plans_more(self, bits: int | None) -> Callable[[float], bool]:
        """Whether the plan for a D loses more than what is to be tried."""
        return lambda D: sum(spectrum.plan(D, bits)[2] for spectrum in self.spectra) > self._goal

    def take(self, found: list[Coded], finest: bool) -> None:
        """Learn from what came of the last try."""
        lost, allowed = sum(layer.error for layer in found), self.allowed
        if lost <= allowed:
            if self.best is None or _bytes(found) < _bytes(self.best):
                self.best = found
            self._within = self._goal
        elif finest:
            self.done = True
        else:
            self._beyond = self._goal
        if (1 - NEAR) * allowed <= lost <= allowed or self._beyond < (1 + NEAR / 3) * self._within:
            self.done = True
        self._goal *= min(max((1 - NEAR / 3) * allowed / max(lost, 1e-300), 0.25), 4.0)
        if not self._within < self._goal < self._beyond:
            self._goal = math.sqrt(self._within * self._beyond)


def _bytes(layers: Sequence[Coded]) -> float:
    """What coding these layers takes, within a few bytes."""
    numbers = sum(layer.factors.B.size + layer.factors.A.size for layer in layers)
    gains = [layer.gains.whole.size for layer in layers if layer.gains is not None]
    heads = [HEAD_BYTES + 4 * lanes_for(numbers)] if numbers or not gains else []
    heads += [HEAD_BYTES + 4 * lanes_for(sum(gains))] if gains else []
    return sum(heads) + EXCESS * sum(layer.bits for layer in layers) / 8


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
