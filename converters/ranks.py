"""Which ranks a budget buys, for all layers of an adapter at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from surgery.adapters.source import Change, Source
from surgery.converters.request import Request
from surgery.errors import MethodError
from surgery.linalg.metric import MetricSVD, energy_rank, greedy_ranks, metric_svd
from surgery.system.text import human_bytes

__all__ = ["Spectra", "changes_of", "decomposed", "entry_bytes"]

# What a tensor's entry in the header of the file takes besides its name.
HEADER_ENTRY = 60
MOST_ROUNDS = 20


def changes_of(source: Source, request: Request) -> list[Change]:
    """The source's changes; those of full rank are cut as the budget says."""
    budget = request.budget
    energy = budget.energy
    if energy is None and budget.max_error is not None:
        energy = 1 - budget.max_error**2
    if energy is None and budget.rank is None and budget.bytes(request.source_bytes) is not None:
        energy = 1.0
    return list(source.changes(budget.rank, energy, request.seed, request.parts))


def decomposed(change: Change, request: Request) -> MetricSVD:
    """A change's singular values and directions, in the metric where there is one."""
    if request.metric is None:
        return metric_svd(change.B, change.A)
    moments = request.metric.projected(change)
    return metric_svd(change.B, change.A, moments.F, moments.C)


def entry_bytes(*names: str) -> int:
    """About what tensors of these names take in the file's header."""
    return sum(len(name) + HEADER_ENTRY for name in names)


@dataclass
class Spectra:
    """Singular values of every layer, and what a rank of it costs.

    Attributes:
        values: by module, in falling order.
        costs: by module, bytes of one rank.
        entries: by module, bytes of having the layer at all.
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)

    def ranks(self, request: Request, size: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
        """Rank by module for the request's budget; without one, all that there is.

        Args:
            request: the request.
            size: bytes of the whole file at given ranks.

        Raises:
            MethodError: the budget is below what the file holds besides, or keeps nothing.
        """
        budget = request.budget
        if budget.rank is not None:
            ranks = {module: min(budget.rank, len(S)) for module, S in self.values.items()}
        elif budget.energy is not None:
            ranks = {module: energy_rank(S, budget.energy) for module, S in self.values.items()}
        elif budget.max_error is not None:
            ranks = greedy_ranks(self.values, self.costs, max_error=budget.max_error)
        else:
            limit = budget.bytes(request.source_bytes)
            ranks = {module: len(S) for module, S in self.values.items()}
            if limit is not None:
                ranks = self._within(limit, size)
        if not any(ranks.values()):
            raise MethodError(f"nothing is kept of any layer: {self._smallest(size)}")
        return ranks

    def _within(self, limit: int, size: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
        none = dict.fromkeys(self.values, 0)
        fixed = size(none)
        room, best = limit - fixed, none
        # What an entry takes is an estimate, so the room is corrected by what the file really has.
        for _ in range(MOST_ROUNDS):
            ranks = greedy_ranks(self.values, self.costs, entries=self.entries, budget=max(room, 0))
            left = limit - size(ranks)
            if left >= 0:
                if ranks == best:
                    break
                best = ranks
            room += left
        if not any(best.values()):
            best = self._one_that_fits(limit, size)
        if limit < fixed or not any(best.values()):
            raise MethodError(f"a file of {human_bytes(limit)} is too small: {self._smallest(size)}")
        return best

    def _one_that_fits(self, limit: int, size: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
        """The one direction that counts most of those whose layer fits."""
        none = dict.fromkeys(self.values, 0)
        by_value = sorted((m for m, S in self.values.items() if len(S)), key=lambda m: -float(self.values[m][0]))
        chosen = next((module for module in by_value if size({**none, module: 1}) <= limit), None)
        return none if chosen is None else {**none, chosen: 1}

    def _smallest(self, size: Callable[[Mapping[str, int]], int]) -> str:
        """What would do: one rank of the layer that needs least."""
        present = [module for module, S in self.values.items() if len(S)]
        if not present:
            return "the adapter changes nothing"
        least = min(present, key=lambda module: self.costs[module])
        needed = size({**dict.fromkeys(self.values, 0), least: 1})
        return f"the smallest that holds what must be carried and one direction is {needed} bytes"
