"""The members of a blend: opened on one base, checked against each other, read layer by layer side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.source import Source
from surgery.blending.combinations import COMBINATIONS, Combination
from surgery.deltas.operators import Delta
from surgery.errors import AdapterError, OptionError, listing
from surgery.models.quantized import unquantized_name
from surgery.models.sites import Form, Site, adaptable_sites

__all__ = ["Blended", "Member", "blended", "check_members", "in_order"]


@dataclass(frozen=True)
class Member:
    """One adapter of a blend.

    Attributes:
        name: as the user named it.
        weight: what its changes are multiplied by.
        source: the adapter on its base.
    """

    name: str
    weight: float
    source: Source

    @property
    def adapter(self) -> Adapter:
        """The adapter."""
        return self.source.adapter

    @property
    def base_name(self) -> str | None:
        """The base model that its configuration names, unquantised; None where it names none."""
        name = self.adapter.config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            return None
        return (unquantized_name(name) or name).rstrip("/")


def check_members(members: Sequence[Member], base: str | None, repeated: bool) -> list[str]:
    """Refuse members that cannot be blended, and return notes on what the user should know.

    Args:
        members: all of them.
        base: the base model that was given, or None.
        repeated: the same member may stand there twice.

    Raises:
        OptionError: weights are not finite or all zero, or a member is there twice.
        AdapterError: members are of different bases, or have no layer in common.
    """
    if len(members) < 2:
        raise OptionError("blend takes at least two adapters; surgery convert brings one into another form")
    for member in members:
        if not math.isfinite(member.weight):
            raise OptionError(f"{member.name}: its weight is {member.weight}, which is no finite number")
    if not any(member.weight for member in members):
        raise OptionError("all weights are zero: the blend would change nothing")
    for place, member in enumerate(members):
        for other in members[:place]:
            if not repeated and member.adapter.same_as(other.adapter):
                raise OptionError(
                    f"{member.name}: is the same adapter as {other.name}, to the bit; give it once with the sum of "
                    "both weights, or allow it with --repeated"
                )
    return [*_base_notes(members, base), *_apart(members)]


def _base_notes(members: Sequence[Member], base: str | None) -> list[str]:
    named = {member.name: member.base_name for member in members if member.base_name is not None}
    if len(set(named.values())) < 2:
        return []
    said = ", ".join(f"{name} is of {of}" for name, of in named.items())
    if base is None:
        raise AdapterError(f"{said}: blend adds adapters of one base; if these are one model, give it with --base")
    return [f"{said}: taken as one model, since --base says {base}"]


def _apart(members: Sequence[Member]) -> list[str]:
    """Notes on layers that some members alone change.

    Raises:
        AdapterError: two have no layer in common, without a base that both fit.
    """
    first, *others = members
    for other in others:
        shared = set(first.source.contents.modules) & set(other.source.contents.modules)
        if not shared and first.source.base is None:
            theirs = listing(other.source.contents.modules, 2)
            raise AdapterError(
                f"{other.name}: changes no layer that {first.name} changes ({theirs}); if both fit one base model, "
                "give it with --base"
            )
    every = set.intersection(*(set(member.source.contents.modules) for member in members))
    found = []
    for member in members:
        alone = [module for module in member.source.contents.modules if module not in every]
        if alone:
            found.append(
                f"{member.name}: changes {len(alone)} layers that not all members change ({listing(alone, 2)})"
            )
    return found


@dataclass
class Blended(Source):
    """The combined changes of several adapters, as the source of a conversion.

    Its `adapter` is the member whose configuration and saved modules are kept; `contents.modules` are the layers of
    all members.

    Attributes:
        members: what is combined.
        names: for each member, the blend's name for a layer -> the member's.
        how: the combination.
        density: share of the entries that is kept, where the combination drops some.
        seed: of the entries that are dropped.
    """

    members: Sequence[Member] = ()
    names: Sequence[Mapping[str, str]] = ()
    how: Combination = COMBINATIONS["sum"]
    density: float | None = None
    seed: int = 0

    def deltas(
        self, order: Sequence[str] | None = None, without: Collection[str] = ()
    ) -> Iterator[tuple[str, Site | None, Delta]]:
        """The combined changes one after the other, in the order of `contents.modules`; one layer is held at a time.

        Raises:
            AdapterError: members change a layer in different shapes.
        """
        wanted = [module for module in (self.contents.modules if order is None else order) if module not in without]
        sites = {module: site for site, module in self.sites.items()}
        readers = [in_order(one.source, names, wanted) for one, names in zip(self.members, self.names, strict=True)]
        for module in wanted:
            found = [(one.weight, next(reader)) for one, reader in zip(self.members, readers, strict=True)]
            terms = [(weight, delta) for weight, delta in found if delta is not None]
            shapes = {delta.shape for _, delta in terms}
            if len(shapes) > 1:
                said = " and ".join(f"{height} x {width}" for height, width in sorted(shapes))
                raise AdapterError(f"{module}: is {said} in different members; blend adds adapters of one base model")
            weights, changes = [weight for weight, _ in terms], [delta for _, delta in terms]
            yield module, sites.get(module), self.how.of_layer(weights, changes, self.density, self.seed, module)

    def biases(self) -> dict[str, torch.Tensor]:
        """What the members add to the outputs of layers whatever the input, `(out,)`: the weighted sum."""
        found: dict[str, torch.Tensor] = {}
        for one, names in zip(self.members, self.names, strict=True):
            own = one.source.biases()
            for module, name in names.items():
                if name in own:
                    found[module] = found.get(module, torch.zeros_like(own[name])) + one.weight * own[name]
        return found

    def form(self, module: str) -> Form:
        """How the weight of a layer is stored: as the first member says that changes it."""
        one, names = next(pair for pair in zip(self.members, self.names, strict=True) if module in pair[1])
        return one.source.form(names[module])


def in_order(source: Source, names: Mapping[str, str], wanted: Sequence[str]) -> Iterator[Delta | None]:
    """The changes of one member for each layer that is wanted; None for one that it does not change."""
    mine = [names[module] for module in wanted if module in names]
    deltas = source.deltas(None if source.base is not None else mine, set(source.contents.modules) - set(mine))
    for module in wanted:
        yield next(deltas)[2] if module in names else None


def blended(members: Sequence[Member], keeper: Member, how: Combination, density: float | None, seed: int) -> Blended:
    """Return the combined changes of members that were checked.

    Args:
        members: all of them.
        keeper: the one whose configuration and saved modules are kept.
        how: the combination.
        density: share of the entries that is kept.
        seed: of what is dropped at random.
    """
    base, old = keeper.source.base, keeper.source.contents
    first = [keeper, *(member for member in members if member is not keeper)]
    sites: dict[Site, str] = {}
    for member in first:
        sites = {**member.source.sites, **sites}
    if base is None:
        names = [{module: module for module in member.source.contents.modules} for member in members]
        modules = list(dict.fromkeys(module for member in first for module in member.source.contents.modules))
    else:
        places = {site.module: place for place, site in enumerate(adaptable_sites(base.model))}
        sites = dict(sorted(sites.items(), key=lambda item: places.get(item[0].module, len(places))))
        names = [{sites[site]: name for site, name in member.source.sites.items()} for member in members]
        # Each member lists its layers in this order as well, which `deltas` goes through.
        modules = list(sites.values())
    return Blended(
        keeper.adapter,
        dataclasses.replace(old, modules=modules),
        base,
        keeper.source.device,
        sites,
        lacking=keeper.source.lacking,
        members=members,
        names=names,
        how=how,
        density=density,
        seed=seed,
    )
