"""The ranks that a budget buys, for all layers of an adapter at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from surgery.adapters.source import Change, Source
from surgery.converters.budget_search import largest
from surgery.converters.request import Request
from surgery.errors import MethodError
from surgery.linalg.metric import MetricSVD, energy_rank, greedy_ranks, metric_svd

__all__ = ["Spectra", "changes_of", "decomposed"]

Ranks = dict[str, int]


def changes_of(source: Source, request: Request, gains: bool = False) -> list[Change]:
    """Return the source's changes; those of full rank are cut as the budget says, gains apart where wanted."""
    budget = request.budget
    energy = budget.energy
    if energy is None and budget.max_error is not None:
        energy = 1 - budget.max_error**2
    if energy is None and budget.rank is None and request.limit is not None:
        energy = 1.0
    return list(source.changes(budget.rank, energy, request.seed, request.parts, gains))


def decomposed(change: Change, request: Request) -> MetricSVD:
    """Return a change's singular values and directions, in the metric where there is one."""
    if request.metric is None:
        return metric_svd(change.B, change.A)
    moments = request.metric.projected(change)
    return metric_svd(change.B, change.A, moments.F, moments.C)


@dataclass
class Spectra:
    """Singular values of every layer, and the cost of a rank.

    Attributes:
        values: by module, in falling order.
        costs: by module, bytes of one rank; None where all layers share their ranks, whose sum a budget of ranks means.
        one_rank: all layers that have a change take the same rank in the file: the highest that one of them needs.
    """

    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    costs: Mapping[str, int] | None = None
    one_rank: bool = False

    def ranks(self, request: Request, size: Callable[[Mapping[str, int]], int]) -> Ranks:
        """Return the rank by module for the request's budget; without one, all that there is.

        Args:
            request: the request.
            size: bytes of the whole file at given ranks.

        Raises:
            MethodError: the budget is below what the file holds besides, or keeps nothing.
        """
        budget = request.budget
        if budget.rank is not None and self.costs is None:
            ranks = greedy_ranks(self.values, self._costs, budget=budget.rank)
        elif budget.rank is not None:
            ranks = self.at_most(budget.rank)
        elif budget.energy is not None:
            ranks = {module: energy_rank(S, budget.energy) for module, S in self.values.items()}
        elif budget.max_error is not None:
            ranks = greedy_ranks(self.values, self._costs, max_error=budget.max_error)
        elif request.limit is not None:
            ranks = self._within(request.limit, size)
        else:
            ranks = {module: len(S) for module, S in self.values.items()}
        if not any(ranks.values()):
            needed = self._smallest(size)
            if request.limit is None or not needed:
                raise MethodError("nothing is kept of any layer: the adapter changes nothing, or keeps no rank")
            raise request.too_small(needed, "rank 1 in all layers" if self.one_rank else "one direction")
        return ranks

    def at_most(self, rank: int) -> Ranks:
        """Return this rank in every layer, or as many as it has."""
        return {module: min(rank, len(S)) for module, S in self.values.items()}

    @property
    def _costs(self) -> Mapping[str, int]:
        return self.costs if self.costs is not None else dict.fromkeys(self.values, 1)

    def _within(self, limit: int, size: Callable[[Mapping[str, int]], int]) -> Ranks:
        """Return the ranks of the largest file that is within the limit; zeros where none is."""
        if self.one_rank:
            most = max(map(len, self.values.values()), default=0)
            common = largest(lambda rank: size(self.at_most(rank)) <= limit, 1, most)
            return self.at_most(common or 0)
        order = self._order()

        def first(count: int) -> Ranks:
            ranks = dict.fromkeys(self.values, 0)
            for module in order[:count]:
                ranks[module] += 1
            return ranks

        count = largest(lambda number: size(first(number)) <= limit, 0, len(order)) or 0
        ranks = first(count)
        if self.costs is None or not count:
            self._fill(ranks, order[count:], limit, size)
        return ranks

    def _fill(self, ranks: Ranks, others: list[str], limit: int, size: Callable[[Mapping[str, int]], int]) -> None:
        """Add directions of those that come after the ones that fit in their order, as far as they fit."""
        for module in others:
            if size({**ranks, module: ranks[module] + 1}) <= limit:
                ranks[module] += 1
                if self.costs is not None:
                    break
            elif ranks[module]:
                break  # one of a layer that is there already costs least

    def _order(self) -> list[str]:
        """Return the layers of all directions, those that hold most for their bytes first."""
        costs = self._costs
        worth = [(float(value) ** 2 / costs[module], module) for module, S in self.values.items() for value in S]
        return [module for _, module in sorted(worth, key=lambda pair: -pair[0])]

    def _smallest(self, size: Callable[[Mapping[str, int]], int]) -> int:
        """Return the bytes of the smallest file that holds a direction of a layer; 0 where there is no change."""
        present = [module for module, S in self.values.items() if len(S)]
        if not present:
            return 0
        if self.one_rank:
            return size(self.at_most(1))
        return min(size({**dict.fromkeys(self.values, 0), module: 1}) for module in present)
