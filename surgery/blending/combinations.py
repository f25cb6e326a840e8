"""The ways to combine the weight changes of one layer, a table: name -> entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash

from surgery.deltas.operators import Delta, Dense, Sum
from surgery.errors import OptionError

__all__ = ["COMBINATIONS", "Combination", "combination_named"]

# (weights of the members, their changes (out, in), share of the entries that is kept)
Rule = Callable[[Sequence[float], Sequence[torch.Tensor], float], torch.Tensor]


@dataclass(frozen=True)
class Combination:
    """A way to combine weight changes.

    Attributes:
        name: as on the command line.
        title: what it does, in a few words.
        paper: where it was published, or None.
        rule: from the changes formed; None for the plain weighted sum, which keeps thin factors thin.
        density: the share of the entries that is kept where nothing else is said; None where none are dropped.
    """

    name: str
    title: str
    paper: str | None = None
    rule: Rule | None = None
    density: float | None = None

    def of_layer(
        self, weights: Sequence[float], changes: Sequence[Delta], density: float | None, seed: int, module: str
    ) -> Delta:
        """Return the combined change of one layer, `(out, in)`.

        Args:
            weights: one for each change.
            changes: of the members that have the layer.
            density: share of the entries of each change that is kept.
            seed: of the entries that are dropped at random.
            module: the layer's name, which the draw depends on besides, so that layers can be made in any order.
        """
        if self.rule is None or self.density is None:
            return Sum(list(zip(weights, changes, strict=True)))
        dense = [change.dense().float() for change in changes]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {module}".encode()) >> 1)
            return Dense(self.rule(weights, dense, self.density if density is None else density))


def _ties(weights: Sequence[float], changes: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    from peft.utils.merge_utils import ties

    return ties(list(changes), _as_tensor(weights, changes), density)


def _dare(weights: Sequence[float], changes: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    from peft.utils.merge_utils import dare_linear

    return dare_linear(list(changes), _as_tensor(weights, changes), density)


def _dare_ties(weights: Sequence[float], changes: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    from peft.utils.merge_utils import dare_ties

    return dare_ties(list(changes), _as_tensor(weights, changes), density)


def _as_tensor(weights: Sequence[float], changes: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float32, device=changes[0].device)


COMBINATIONS: Mapping[str, Combination] = {
    entry.name: entry
    for entry in (
        Combination("sum", "the weighted sum, exact"),
        Combination(
            "ties",
            "each member's largest entries; the sign with the greater sum; the mean of those that agree with it",
            "arXiv 2306.01708",
            _ties,
            0.5,
        ),
        Combination(
            "dare", "entries dropped at random, the others scaled up; the weighted sum", "arXiv 2311.03099", _dare, 0.5
        ),
        Combination(
            "dare-ties", "entries dropped at random, the others scaled up; signs as in ties", "arXiv 2311.03099",
            _dare_ties, 0.5,
        ),
    )
}  # fmt: skip


def combination_named(name: str, density: float | None = None) -> Combination:
    """Return the combination of this name.

    Raises:
        OptionError: there is none, or it takes no density, or not this one.
    """
    found = COMBINATIONS.get(name)
    if found is None:
        raise OptionError(f"how: unknown combination {name!r}: use {', '.join(COMBINATIONS)}")
    if density is not None and found.density is None:
        droppers = ", ".join(each.name for each in COMBINATIONS.values() if each.density is not None)
        raise OptionError(f"density: {name} drops no entries; it is an option of {droppers}")
    if density is not None and not 0 < density <= 1:
        raise OptionError(f"density: is the share of the entries that is kept, above 0 and at most 1, got {density}")
    return found
