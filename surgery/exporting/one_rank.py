"""Any adapter as a plain LoRA of one rank and one scale: the form in which every reader computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.source import Change, Source
from surgery.adapters.types.lora import A_NAME, B_NAME, LORA
from surgery.errors import AdapterError, OptionError
from surgery.linalg.low_rank import svd_of_product
from surgery.linalg.metric import energy_rank
from surgery.system.tensors import MadeTensors
from surgery.system.threads import one_torch_thread

__all__ = ["MadeChanges", "OneRank", "lora_tensors", "one_rank", "one_rank_on_demand", "planned_changes"]


@dataclass
class OneRank:
    """An adapter's changes at one common rank.

    Attributes:
        changes: the changes, their factors of rank `rank` (zeros fill what a layer has less), by the model's names;
            those of `one_rank_on_demand` are made when they are asked for.
        ranks: each layer's own rank, without padding.
        rank: the common rank.
        scale: the number that dW takes besides B A in every layer: `lora_alpha / r`.
    """

    changes: Mapping[str, Change]
    ranks: dict[str, int]
    rank: int
    scale: float

    @property
    def padding(self) -> int:
        """Numbers in the factors that are zeros for the common rank alone."""
        return sum((self.rank - self.ranks[module]) * sum(change.shape) for module, change in self.changes.items())


class MadeChanges(Mapping[str, Change]):
    """Changes that are made when they are asked for; the last one is held.

    Args:
        planned: by name, changes whose factors are on the meta device.
        make: returns the change of a name.
    """

    def __init__(self, planned: Mapping[str, Change], make: Callable[[str], Change]) -> None:
        self.planned, self._make = planned, make
        self._last: tuple[str, Change] | None = None

    def __getitem__(self, name: str) -> Change:
        if self._last is None or self._last[0] != name:
            self._last = None  # let go of before the next is made
            self._last = name, self._make(name)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.planned)

    def __len__(self) -> int:
        return len(self.planned)


def one_rank_on_demand(source: Source) -> OneRank | None:
    """Bring an adapter to one rank as `one_rank` does without a cut, each layer when it is asked for.

    Returns:
        None where changes depend on the base model, or have no thin factors: these are for `one_rank`.
    """
    if source.contents.needs or source.contents.lacks_shared:
        return None
    modules: dict[str, str] = {}
    planned: dict[str, Change] = {}
    ranks: dict[str, int] = {}
    scales: set[float] = set()
    for module in source.contents.modules:
        change = source.exact_change(module)
        if change is None:
            return None
        name = _new_name(source, change, planned)
        modules[name], ranks[name] = module, change.rank
        planned[name] = replace(change, B=change.B.to("meta"), A=change.A.to("meta"))
        scales.add(_scale(source, module))
    common = _common(source, ranks)
    scale = scales.pop() if len(scales) == 1 else 0.0

    def made(name: str) -> Change:
        change = source.exact_change(modules[name])
        assert change is not None
        return _padded(_without_scale(source, change) if scale else change, common)

    planned = {name: _padded(change, common) for name, change in planned.items()}
    return OneRank(MadeChanges(planned, made), ranks, common, scale or 1.0)


def planned_changes(lora: OneRank) -> Mapping[str, Change]:
    """Return the changes without making any: their factors may be on the meta device."""
    return lora.changes.planned if isinstance(lora.changes, MadeChanges) else lora.changes


def one_rank(source: Source, rank: int | None = None, energy: float | None = None, seed: int = 0) -> OneRank:
    """Bring an adapter to one rank.

    Without rank and energy nothing is cut: the largest rank is common. A LoRA with one scale keeps it, and with it its
    factors to the last bit; otherwise the scale is in B.

    Args:
        source: the adapter.
        rank: cut every layer that has more to this rank.
        energy: cut to the lowest rank at which every layer keeps this share of its squared norm.
        seed: of the decompositions of changes of full rank.

    Raises:
        AdapterError: a change has no thin factors, and neither rank nor energy is given.
        OptionError: rank or energy is out of range, or both are given.
    """
    _check(rank, energy)
    scale, changes = _scaled(source, source.changes(rank, energy, seed))
    with one_torch_thread():
        cut = _cut(changes, rank, energy)
    ranks = {change.module: change.rank for change in cut}
    common = _common(source, ranks)
    named: dict[str, Change] = {}
    for change in cut:
        named[_new_name(source, change, named)] = _padded(change, common)
    by_name = dict(zip(named, ranks.values(), strict=True))
    return OneRank(named, by_name, common, scale)


def _common(source: Source, ranks: Mapping[str, int]) -> int:
    common = max(ranks.values())
    if common == 0:
        raise AdapterError(f"{source.adapter.label}: has factors of rank 0 alone, there is nothing to export")
    return common


def _new_name(source: Source, change: Change, named: Mapping[str, Change]) -> str:
    """Return the model's name for a layer, which no other one may have."""
    name = change.site.module if change.site is not None else change.module
    if name in named:
        raise AdapterError(f"{source.adapter.label}: changes {name} twice, under two names")
    return name


def _check(rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise OptionError("give one of rank and energy, not both")
    if rank is not None and rank < 1:
        raise OptionError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise OptionError(f"energy is a share between 0 and 1, got {energy}")


def _scaled(source: Source, changes: Iterable[Change]) -> tuple[float, list[Change]]:
    """Return a common scale and the changes without it; a stock LoRA's factors are then those of its file."""
    scales = {_scale(source, module) for module in source.contents.modules}
    scale = scales.pop() if len(scales) == 1 else 0.0
    if scale == 0.0:
        return 1.0, list(changes)
    return scale, [_without_scale(source, change) for change in changes]


def _scale(source: Source, module: str) -> float:
    """Return the scale of a layer of a stock LoRA; 0 for other types, whose scales are in their factors."""
    if source.adapter.type is not LORA:
        return 0.0
    scale: float = source.adapter.delta(module).scale  # type: ignore[attr-defined]
    return scale


def _without_scale(source: Source, change: Change) -> Change:
    """Return the change of a layer of a stock LoRA with the factors of its file."""
    own = source.adapter.layer(change.module)
    return replace(change, B=own[B_NAME].float(), A=own[A_NAME].float())


def _cut(changes: list[Change], rank: int | None, energy: float | None) -> list[Change]:
    """Cut what has more than the common rank; what has no more stays as it is."""
    if rank is None and (energy is None or energy == 1.0):
        return changes
    products = {change.module: svd_of_product(change.B.double(), change.A.double()) for change in changes}
    if rank is None:
        assert energy is not None
        # Of what was cut already, the share that is still to be kept is of the whole.
        shares = {c.module: min(energy / max(1 - c.lost**2, energy), 1.0) for c in changes}
        needed = (energy_rank(product.S, shares[module]) for module, product in products.items())
        rank = max(1, *needed)
    result = []
    for change in changes:
        if change.rank <= rank:
            result.append(change)
            continue
        product = products[change.module]
        kept = type(product)(product.U[:, :rank], product.S[:rank], product.Vh[:rank], product.energy)
        B, A = (factor.float() for factor in kept.balanced())
        # What is cut here is orthogonal to what was cut before.
        lost = (change.lost**2 + (1 - change.lost**2) * kept.relative_error**2) ** 0.5
        result.append(replace(change, B=B, A=A, lost=lost))
    return result


def _padded(change: Change, rank: int) -> Change:
    missing = rank - change.rank
    if not missing:
        return change
    B = torch.cat([change.B, change.B.new_zeros(change.B.shape[0], missing)], 1)
    return replace(change, B=B, A=torch.cat([change.A, change.A.new_zeros(missing, change.A.shape[1])], 0))


def lora_tensors(lora: OneRank) -> MadeTensors:
    """Return the factors under PEFT's names, made when they are asked for where the changes are."""
    shapes, where = {}, {}
    for module, change in planned_changes(lora).items():
        for short, factor in ((B_NAME, change.B), (A_NAME, change.A)):
            name = f"{MODEL_PREFIX}{module}.{short}"
            shapes[name], where[name] = factor if factor.is_meta else factor.contiguous(), (module, short)

    def made(name: str) -> torch.Tensor:
        module, short = where[name]
        change = lora.changes[module]
        return (change.B if short == B_NAME else change.A).contiguous()

    return MadeTensors(shapes, made)
