"""Any adapter as a plain LoRA of one rank and one scale: the form in which every reader computes the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.source import Change, Source
from surgery.adapters.types.lora import A_NAME, B_NAME, LORA
from surgery.errors import AdapterError, OptionError
from surgery.linalg.low_rank import svd_of_product
from surgery.linalg.metric import energy_rank
from surgery.system.threads import one_torch_thread

__all__ = ["OneRank", "one_rank"]


@dataclass
class OneRank:
    """An adapter's changes at one common rank.

    Attributes:
        changes: the changes, their factors of rank `rank` (zeros fill what a layer has less), by the model's names.
        ranks: each layer's own rank, without padding.
        rank: the common rank.
        scale: the number that dW takes besides B A in every layer: `lora_alpha / r`.
    """

    changes: dict[str, Change]
    ranks: dict[str, int]
    rank: int
    scale: float

    @property
    def padding(self) -> int:
        """Numbers in the factors that are zeros for the common rank alone."""
        return sum((self.rank - self.ranks[module]) * sum(change.shape) for module, change in self.changes.items())


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
    common = max(ranks.values())
    if common == 0:
        raise AdapterError(f"{source.adapter.label}: has factors of rank 0 alone, there is nothing to export")
    named = {}
    for change in cut:
        name = change.site.module if change.site is not None else change.module
        if name in named:
            raise AdapterError(f"{source.adapter.label}: changes {name} twice, under two names")
        named[name] = _padded(change, common)
    by_name = dict(zip(named, ranks.values(), strict=True))
    return OneRank(named, by_name, common, scale)


def _check(rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise OptionError("give one of rank and energy, not both")
    if rank is not None and rank < 1:
        raise OptionError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise OptionError(f"energy is a share between 0 and 1, got {energy}")


def _scaled(source: Source, changes: Iterable[Change]) -> tuple[float, list[Change]]:
    """Return a common scale and the changes without it; a stock LoRA's factors are then those of its file."""
    adapter = source.adapter
    if adapter.type is not LORA:
        return 1.0, list(changes)
    scales = {adapter.delta(module).scale for module in source.contents.modules}  # type: ignore[attr-defined]
    scale = scales.pop() if len(scales) == 1 else 0.0
    if scale == 0.0:
        return 1.0, list(changes)
    stripped = []
    for change in changes:
        own = adapter.layer(change.module)
        stripped.append(replace(change, B=own[B_NAME].float(), A=own[A_NAME].float()))
    return scale, stripped


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


def lora_tensors(lora: OneRank) -> dict[str, torch.Tensor]:
    """Return the factors under PEFT's names."""
    tensors = {}
    for module, change in lora.changes.items():
        tensors[f"{MODEL_PREFIX}{module}.{B_NAME}"] = change.B.contiguous()
        tensors[f"{MODEL_PREFIX}{module}.{A_NAME}"] = change.A.contiguous()
    return tensors
