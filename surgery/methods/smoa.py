"""SMoA (arXiv 2601.07507v1): `dW = sum_k M_k * (B_k A_k)`, M_k the spectral components of the base weight.

The singular values of `W`, in falling order, are cut into K groups of equal sum, and `M_k = U_k Sigma_k V_k^T`, so
`sum_k M_k = W`. The masks are not stored: an adapter holds where the spectrum is cut, and rebuilds them from the
base on load, the last as what remains of `W`. With K = 1 the method is HiRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.deltas.operators import Delta, Hadamard
from surgery.errors import AdapterError, MethodError
from surgery.linalg.seeded import generator_for, kaiming_uniform
from surgery.linalg.spectral_groups import equal_share_cuts, top_components
from surgery.methods.base import (
    OwnConfig,
    OwnMethod,
    OwnType,
    Role,
    Spec,
    Tensors,
    capped_rank_note,
    positive_rank,
)
from surgery.models.sites import Site

DEFAULT_GROUPS = 2


@dataclass
class SmoaConfig(OwnConfig):
    """Configuration of an `SMOA` adapter.

    Attributes:
        r: rank over all groups, capped at min(in, out) of each layer; split evenly over the groups.
        groups: K, the number of spectral groups.
    """

    r: int = field(default=32, metadata={"help": "Rank over all groups."})
    groups: int = field(default=DEFAULT_GROUPS, metadata={"help": "Number of spectral groups."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = OwnType.SMOA
        positive_rank(self.r)
        if not isinstance(self.groups, int) or self.groups < 1:
            raise MethodError(f"the number of groups must be at least 1, got {self.groups!r}")
        if self.r < self.groups:
            raise MethodError(f"rank {self.r} cannot be split over {self.groups} groups: give at least {self.groups}")


class SMoA(OwnMethod):
    """Elementwise modulation of the weight's spectral components."""

    peft_type = OwnType.SMOA
    config_class = SmoaConfig
    trains_as_one = True
    on_base_weight = True
    thin = False
    specs = (
        Spec("A", Role.TRAINABLE),
        Spec("B", Role.TRAINABLE),
        Spec("cuts", Role.KEPT),
        Spec("masks", Role.DERIVED),
    )

    def make_config(self, options: dict[str, Any], common: dict[str, Any]) -> SmoaConfig:
        rank = positive_rank(options.get("rank", self.info.rank))
        groups = options.get("groups")
        return SmoaConfig(r=rank, groups=DEFAULT_GROUPS if groups is None else groups, **common)

    def notes(self, config: SmoaConfig, sites: Sequence[Site]) -> list[str]:
        narrow = [site.module for site in sites if site.max_rank < config.groups]
        if narrow:
            raise MethodError(f"{narrow[0]} has fewer singular values than the {config.groups} groups")
        return capped_rank_note(config.r, sites)

    def shapes(self, config: SmoaConfig, site: Site) -> dict[str, tuple[int, ...]]:
        rank = min(config.r, site.max_rank)
        return {"A": (rank, site.in_features), "B": (site.out_features, rank), "cuts": (config.groups - 1,)}

    def dtype(self, name: str, site: Site) -> torch.dtype:
        return torch.int32 if name == "cuts" else super().dtype(name, site)

    def kept(self, config: SmoaConfig, site: Site, bases: Tensors, weight: torch.Tensor | None) -> Tensors:
        assert weight is not None
        return {"cuts": torch.tensor(equal_share_cuts(weight, config.groups), dtype=torch.int32)}

    def trainables(self, config: SmoaConfig, site: Site, frozen: Tensors) -> Tensors:
        generator = generator_for(config.seed, site.key)
        rank = min(config.r, site.max_rank)
        # Uniform in +-1 / sqrt(in): nn.Linear's own start, and HiRA's.
        A = kaiming_uniform((rank, site.in_features), generator, gain=1 / math.sqrt(3.0))
        return {"A": A, "B": torch.zeros(site.out_features, rank)}

    def derived(self, config: SmoaConfig, tensors: Tensors, weight: Callable[[], torch.Tensor]) -> Tensors:
        cuts = tensors["cuts"].tolist()
        whole = weight()
        if sorted(cuts) != cuts or not all(0 <= cut <= min(whole.shape) for cut in cuts):
            raise AdapterError(f"smoa_cuts are {cuts}, no rising numbers up to {min(whole.shape)}")
        return {"masks": top_components(whole, cuts)}

    def delta(self, config: SmoaConfig, tensors: Tensors, weight: torch.Tensor | None, module: str = "") -> Delta:
        if weight is None:
            raise MethodError("SMoA needs the base weight that its masks are components of")
        ranks = split_rank(tensors["A"].shape[0], config.groups)
        pairs = zip(tensors["B"].split(ranks, 1), tensors["A"].split(ranks, 0), strict=True)
        return Hadamard(weight, list(tensors["masks"]), list(pairs))


def split_rank(rank: int, groups: int) -> list[int]:
    """`rank` over `groups` as evenly as possible, the first groups taking the remainder."""
    return [rank // groups + (index < rank % groups) for index in range(groups)]


METHODS = {"smoa": SMoA("smoa")}
