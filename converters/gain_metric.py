"""What errors in gains on a layer's weight cost, beside those of its factors: from the base weight and the moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from surgery.adapters.source import Change, Source
from surgery.codec.gains import GainVector
from surgery.converters.budget import Budget
from surgery.converters.request import Metric
from surgery.deltas.operators import INPUTS, Gain

__all__ = ["GainMetric"]

# As the codec damps second moments.
DAMPING = 0.1

Moment = torch.Tensor | None
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # B, A, s


@dataclass
class GainMetric:
    """The metric of an adapter whose layers have gains. Base weights are read one at a time.

    Attributes:
        source: the adapter, on its base.
        changes: its changes, gains apart.
        metric: second moments, or None.
        vectors: of each layer, its gains as they are to be coded; None for a layer without.
    """

    source: Source
    changes: Sequence[Change]
    metric: Metric | None
    vectors: list[GainVector | None] = field(default_factory=list)

    @classmethod
    def of(cls, source: Source, changes: Sequence[Change], metric: Metric | None) -> GainMetric | None:
        """Return the metric; None where no layer has gains."""
        if all(change.gain is None for change in changes):
            return None
        made = cls(source, changes, metric)
        made.vectors = [made._vector(change) for change in changes]
        return made

    def excess(
        self, budget: Budget, factors: Mapping[str, Factors], gains: Mapping[str, tuple[torch.Tensor, float]]
    ) -> float:
        """Return the energy that is lost over what a budget allows: of the worst layer, or of all together.

        Args:
            budget: of `energy` or `max_error`.
            factors: what is left, by module.
            gains: the gains less one that are left, by module.
        """
        lost, whole = [], []
        for change in self.changes:
            weight, (C, F) = self._weight(change), self._moments(change)
            meant = _dense(weight, change.gain, change.B, change.A)
            B, A, s = factors.get(change.module, (change.B[:, :0], change.A[:0], torch.zeros(0)))
            values = gains.get(change.module)
            gain = None
            if values is not None and change.gain is not None and change.gain.vector is not None:
                gain = Gain.of_kind(change.gain.vector[0], values[0], None, change.shape)
            rest = meant - _dense(weight, gain, B * s, A)
            lost.append(_inner(rest, rest, C, F))
            whole.append(_inner(meant, meant, C, F))
        if budget.max_error is not None:
            allowed = budget.max_error**2 * sum(whole)
            return sum(lost) / allowed if allowed > 0 else 0.0
        assert budget.energy is not None
        share = max(1 - budget.energy, 1e-14)
        return max((one / (share * all_) for one, all_ in zip(lost, whole, strict=True) if all_ > 0), default=0.0)

    def _vector(self, change: Change) -> GainVector | None:
        if change.gain is None or change.gain.vector is None:
            return None
        kind, values = change.gain.vector
        weight, (C, F) = self._weight(change), self._moments(change)
        if kind == INPUTS:
            own = (_times(F, weight) * weight).sum(0)
            weights = own if C is None else own * C.diagonal()
        else:
            own = (_by(weight, C) * weight).sum(1)
            weights = own if F is None else own * F.diagonal()
        gained, low_rank = _dense(weight, change.gain, None, None), (change.B.double() @ change.A.double())
        return GainVector(
            values.double().numpy(),
            weights.clamp_min(0).numpy(),
            _inner(gained, gained, C, F),
            _inner(gained, low_rank, C, F) if change.rank else 0.0,
        )

    def _weight(self, change: Change) -> torch.Tensor:
        """The base weight `(out, in)`, float64, on the CPU."""
        assert self.source.base is not None and change.site is not None
        return self.source.base.weight(change.site).double()

    def _moments(self, change: Change) -> tuple[Moment, Moment]:
        """C and F, float64 and damped as the codec has them."""
        if self.metric is None:
            return None, None
        found = self.metric.full(change)
        return _damped(found.C), _damped(found.F)


def _damped(moment: torch.Tensor) -> Moment:
    if not bool(moment.diagonal().any()):
        return None
    wide = moment.double().clone()
    wide.diagonal().add_(DAMPING * float(wide.diagonal().mean()))
    return wide


def _dense(weight: torch.Tensor, gain: Gain | None, B: torch.Tensor | None, A: torch.Tensor | None) -> torch.Tensor:
    """`diag(g) W + B A`, or the like for columns, float64."""
    total = torch.zeros_like(weight)
    if gain is not None and gain.vector is not None:
        kind, values = gain.vector
        total = weight * values.double() if kind == INPUTS else values.double()[:, None] * weight
    return total if B is None or A is None else total + B.double() @ A.double()


def _times(F: Moment, P: torch.Tensor) -> torch.Tensor:
    return P if F is None else F @ P


def _by(P: torch.Tensor, C: Moment) -> torch.Tensor:
    return P if C is None else P @ C


def _inner(P: torch.Tensor, Q: torch.Tensor, C: Moment, F: Moment) -> float:
    """`tr(P^T F Q C)`."""
    return float((_times(F, P) * _by(Q, C)).sum())
