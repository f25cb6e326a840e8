"""SMoA (arXiv 2601.07507): low-rank factors that multiply parts of the base weight, entry by entry.

Two variants. `blocks` is what the authors' code does: rows and columns are sorted by where in the spectrum of `W`
their energy lies and cut into K parts, and `dW[rows_k, columns_k] = (alpha / r) (B_k A_k) * W[rows_k, columns_k]`,
zero elsewhere. The base weight itself is the anchor: a load needs to know which row and column is in which block, no
decomposition and no copy of the weight. Within a block rows and columns keep their order in the weight: all rows of
`B_k` and columns of `A_k` start alike, so that the order by score inside a block makes no other method.

`components` is a reading of the first version's abstract, which surgery 0.1.0 called SMoA: the singular values of
`W`, in falling order, are cut into K groups of equal sum, `M_k = U_k S_k V_k^T`, and `dW = sum_k M_k * (B_k A_k)`.

With K = 1 both are HiRA, `blocks` with a scale.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from surgery.deltas.blocks import Blocks
from surgery.deltas.operators import Delta, Hadamard
from surgery.errors import AdapterError, MethodError
from surgery.linalg.seeded import generator_for, kaiming_uniform
from surgery.linalg.spectral_groups import equal_share_cuts, top_components
from surgery.linalg.spectral_scores import (
    block_labels,
    pack_labels,
    packed_length,
    part_sizes,
    spectral_scores,
    unpack_labels,
)
from surgery.methods.base import (
    CHECK,
    Bases,
    OwnConfig,
    OwnMethod,
    Role,
    Spec,
    WeightReader,
    capped_rank_note,
    positive_rank,
)
from surgery.methods.catalogue import SMOA, MethodInfo
from surgery.models.sites import Site
from surgery.storage.format_version import BLOCKS_VERSION
from surgery.system.tensors import Tensors

DEFAULT_GROUPS = 2
LINEAR_GAIN = 1 / math.sqrt(3.0)  # Kaiming-uniform with a = sqrt 5: uniform in +-1 / sqrt(fan_in)


@dataclass
class SmoaConfig(OwnConfig):
    """Configuration of an `SMOA` adapter.

    Attributes:
        r: rank over all groups, split evenly over them; `components` caps it at min(in, out) of each layer.
        groups: K, the number of blocks, or of spectral components.
        variant: `blocks` or `components`. None, and no such key, stands for `blocks` in a configuration that starts an
            adapter, and for `components` in that of a saved one: before there were variants, there was that.
        lora_alpha: of `blocks`: the scale is `lora_alpha / r`; None for r.
        branch_ranks: of `blocks`: the rank of each block, whose sum is r; None to split r evenly.
    """

    info: ClassVar[MethodInfo] = SMOA
    r: int = field(default=32, metadata={"help": "Rank over all groups."})
    groups: int = field(default=DEFAULT_GROUPS, metadata={"help": "Number of blocks, or of spectral components."})
    variant: str | None = field(default=None, metadata={"help": "blocks (as published) or components."})
    lora_alpha: float | None = field(default=None, metadata={"help": "blocks: the scale is lora_alpha / r; default r."})
    branch_ranks: list[int] | None = field(default=None, metadata={"help": "blocks: rank of each block; sum is r."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant is None:
            self.variant = "blocks" if self.init_weights else "components"
        if self.variant not in VARIANTS:
            raise MethodError(f"SMoA has variants {', '.join(VARIANTS)}, not {self.variant!r}")
        positive_rank(self.r)
        if not isinstance(self.groups, int) or isinstance(self.groups, bool) or self.groups < 1:
            raise MethodError(f"the number of groups must be at least 1, got {self.groups!r}")
        if self.r < self.groups:
            raise MethodError(f"rank {self.r} cannot be split over {self.groups} groups: give at least {self.groups}")
        VARIANTS[self.variant].complete(self)

    @property
    def ranks(self) -> list[int]:
        """The rank of each group."""
        return list(self.branch_ranks) if self.branch_ranks is not None else split_rank(self.r, self.groups)


class Variant(ABC):
    """The formulas of one variant: what of `OwnMethod` depends on it."""

    specs: tuple[Spec, ...]

    @abstractmethod
    def complete(self, config: SmoaConfig) -> None:
        """Check a configuration, and set what depends on the variant.

        Raises:
            MethodError: it holds what the variant does not take.
        """

    @abstractmethod
    def notes(self, config: SmoaConfig, sites: Sequence[Site]) -> list[str]:
        """What the user should know, besides what all methods say.

        Raises:
            MethodError: a layer is too small for the groups.
        """

    @abstractmethod
    def rank_at(self, config: SmoaConfig, site: Site) -> int:
        """The rank over all groups at a site."""

    @abstractmethod
    def shapes(self, config: SmoaConfig, site: Site) -> dict[str, tuple[int, ...]]:
        """As `OwnMethod.shapes`."""

    def bases(self, config: SmoaConfig, sites: Sequence[Site], weight: WeightReader) -> Bases:
        """As `OwnMethod.bases`."""
        return Bases(own=[{} for _ in sites])

    def kept(self, config: SmoaConfig, weight: torch.Tensor | None) -> Tensors:
        """As `OwnMethod.kept`."""
        return {}

    @abstractmethod
    def trainables(self, config: SmoaConfig, site: Site) -> Tensors:
        """As `OwnMethod.trainables`."""

    @abstractmethod
    def derived(self, config: SmoaConfig, tensors: Tensors, weight: torch.Tensor) -> Tensors:
        """As `OwnMethod.derived`."""

    @abstractmethod
    def delta(self, config: SmoaConfig, tensors: Tensors, weight: torch.Tensor) -> Delta:
        """As `OwnMethod.delta`."""


class DiagonalBlocks(Variant):
    """As published: `dW[rows_k, columns_k] = (alpha / r) (B_k A_k) * W[rows_k, columns_k]`."""

    specs = (
        Spec("A", Role.TRAINABLE),
        Spec("B", Role.TRAINABLE),
        Spec("order", Role.BASE),
        Spec("rows", Role.DERIVED),
        Spec("columns", Role.DERIVED),
    )

    def complete(self, config: SmoaConfig) -> None:
        config.format_version = BLOCKS_VERSION
        if config.lora_alpha is None:
            config.lora_alpha = config.r
        if not 0 < config.lora_alpha < math.inf:
            raise MethodError(f"alpha must be positive and finite, got {config.lora_alpha}")
        ranks = config.branch_ranks
        if ranks is None:
            return
        config.branch_ranks = ranks = list(ranks)
        if any(not isinstance(rank, int) or isinstance(rank, bool) or rank < 0 for rank in ranks):
            raise MethodError(f"branch ranks must be whole numbers of at least 0, got {ranks}")
        if len(ranks) != config.groups or sum(ranks) != config.r:
            raise MethodError(
                f"branch ranks {ranks} are {len(ranks)} with sum {sum(ranks)}: {config.groups} groups of rank "
                f"{config.r} want {config.groups} with sum {config.r}"
            )

    def notes(self, config: SmoaConfig, sites: Sequence[Site]) -> list[str]:
        for site in sites:
            if site.max_rank < config.groups:
                raise MethodError(
                    f"{site.module} is {site.out_features} x {site.in_features}: too small for the {config.groups} "
                    f"groups, give --groups {site.max_rank} or fewer"
                )
        high, wide = max(config.ranks), [site for site in sites if site.max_rank // config.groups < max(config.ranks)]
        if not wide:
            return []
        return [
            f"blocks of {len(wide)} of {len(sites)} layers have fewer rows or columns than their rank, up to {high}: "
            "a lower --rank trains fewer numbers with the same freedom there",
        ]

    def rank_at(self, config: SmoaConfig, site: Site) -> int:
        return config.r

    def shapes(self, config: SmoaConfig, site: Site) -> dict[str, tuple[int, ...]]:
        height, width = (-(-size // config.groups) for size in (site.out_features, site.in_features))
        return {
            "A": (config.r, width),
            "B": (height, config.r),
            "order": (packed_length(site.out_features + site.in_features, config.groups),),
            CHECK: (2,),
        }

    def bases(self, config: SmoaConfig, sites: Sequence[Site], weight: WeightReader) -> Bases:
        # What is not stored has to be found again by other machines, whose float32 rounds in another way.
        exact = not config.store_bases
        return Bases(own=[{"order": block_order(matrix, config.groups, exact)} for matrix in weight.each(sites)])

    def trainables(self, config: SmoaConfig, site: Site) -> Tensors:
        generator, shapes = generator_for(config.seed, site.key), self.shapes(config, site)
        A, start = torch.zeros(shapes["A"]), 0
        # What pads the narrower blocks stays zero: nothing depends on it.
        for rank, width in zip(config.ranks, part_sizes(site.in_features, config.groups), strict=True):
            A[start : start + rank, :width] = kaiming_uniform((rank, width), generator, LINEAR_GAIN)
            start += rank
        return {"A": A, "B": torch.zeros(shapes["B"])}

    def derived(self, config: SmoaConfig, tensors: Tensors, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        try:
            labels = unpack_labels(tensors["order"], rows + columns, config.groups).split([rows, columns])
        except ValueError:
            raise AdapterError(
                f"smoa_order does not say which of {config.groups} blocks {rows} rows and {columns} columns are in: "
                "the file is broken"
            ) from None
        for each in labels:
            if each.bincount(minlength=config.groups).tolist() != part_sizes(each.numel(), config.groups):
                raise AdapterError("smoa_order divides rows or columns into blocks of other sizes: the file is broken")
        found = (torch.argsort(each, stable=True).to(weight.device) for each in labels)
        return dict(zip(("rows", "columns"), found, strict=True))

    def delta(self, config: SmoaConfig, tensors: Tensors, weight: torch.Tensor) -> Delta:
        assert config.lora_alpha is not None
        A, B, scale = tensors["A"], tensors["B"], config.lora_alpha / config.r
        return Blocks(weight, tensors["rows"], tensors["columns"], B, A, config.ranks, scale)


class SpectralComponents(Variant):
    """The reading of the first abstract: `dW = sum_k M_k * (B_k A_k)`.

    The masks are not stored: an adapter holds where the spectrum is cut, and rebuilds them from the base on load, the
    last as what remains of `W`.
    """

    specs = (
        Spec("A", Role.TRAINABLE),
        Spec("B", Role.TRAINABLE),
        Spec("cuts", Role.KEPT),
        Spec("masks", Role.DERIVED),
    )

    def complete(self, config: SmoaConfig) -> None:
        for name in ("lora_alpha", "branch_ranks"):
            if getattr(config, name) is not None:
                raise MethodError(f"variant components of SMoA takes no {name}: it has no scale, and splits r evenly")

    def notes(self, config: SmoaConfig, sites: Sequence[Site]) -> list[str]:
        narrow = [site.module for site in sites if site.max_rank < config.groups]
        if narrow:
            raise MethodError(f"{narrow[0]} has fewer singular values than the {config.groups} groups")
        return capped_rank_note(config.r, sites)

    def rank_at(self, config: SmoaConfig, site: Site) -> int:
        return min(config.r, site.max_rank)

    def shapes(self, config: SmoaConfig, site: Site) -> dict[str, tuple[int, ...]]:
        rank = self.rank_at(config, site)
        return {"A": (rank, site.in_features), "B": (site.out_features, rank), "cuts": (config.groups - 1,)}

    def kept(self, config: SmoaConfig, weight: torch.Tensor | None) -> Tensors:
        assert weight is not None
        return {"cuts": torch.tensor(equal_share_cuts(weight, config.groups), dtype=torch.int32)}

    def trainables(self, config: SmoaConfig, site: Site) -> Tensors:
        generator, rank = generator_for(config.seed, site.key), self.rank_at(config, site)
        # nn.Linear's own start, and HiRA's.
        A = kaiming_uniform((rank, site.in_features), generator, LINEAR_GAIN)
        return {"A": A, "B": torch.zeros(site.out_features, rank)}

    def derived(self, config: SmoaConfig, tensors: Tensors, weight: torch.Tensor) -> Tensors:
        cuts = tensors["cuts"].tolist()
        if sorted(cuts) != cuts or not all(0 <= cut <= min(weight.shape) for cut in cuts):
            raise AdapterError(f"smoa_cuts are {cuts}, no rising numbers up to {min(weight.shape)}")
        return {"masks": top_components(weight, cuts)}

    def delta(self, config: SmoaConfig, tensors: Tensors, weight: torch.Tensor) -> Delta:
        ranks = split_rank(tensors["A"].shape[0], config.groups)
        pairs = zip(tensors["B"].split(ranks, 1), tensors["A"].split(ranks, 0), strict=True)
        return Hadamard(weight, list(tensors["masks"]), list(pairs))


VARIANTS: dict[str, Variant] = {"blocks": DiagonalBlocks(), "components": SpectralComponents()}


class SMoA(OwnMethod):
    """Elementwise modulation of parts of the weight."""

    config_class = SmoaConfig
    trains_as_one = True
    on_base_weight = True
    thin = False
    specs = tuple(dict.fromkeys(spec for variant in VARIANTS.values() for spec in variant.specs))

    def specs_for(self, config: Any) -> tuple[Spec, ...]:
        # A saved configuration without a variant is older than the variants.
        named = config.get("variant") or "components" if isinstance(config, Mapping) else config.variant
        if named not in VARIANTS:
            raise AdapterError(f"adapter_config.json: SMoA has variants {', '.join(VARIANTS)}, not {named!r}")
        return VARIANTS[named].specs

    def make_config(self, options: dict[str, Any], common: dict[str, Any]) -> SmoaConfig:
        ranks = options.get("branch_ranks")
        rank, groups = options.get("rank"), options.get("groups")
        if rank is None:
            rank = sum(ranks) if ranks is not None else self.info.rank
        if groups is None:
            groups = len(ranks) if ranks is not None else DEFAULT_GROUPS
        variant, store = options.get("variant") or "blocks", options.get("store_bases", True)
        if variant == "components" and not store:
            raise MethodError("variant components of SMoA stores no bases: leave out --no-store-bases")
        return SmoaConfig(
            r=positive_rank(rank),
            groups=groups,
            variant=variant,
            lora_alpha=options.get("alpha"),
            branch_ranks=list(ranks) if ranks is not None else None,
            store_bases=store,
            **common,
        )

    def notes(self, config: SmoaConfig, sites: Sequence[Site]) -> list[str]:
        return super().notes(config, sites) + _variant(config).notes(config, sites)

    def rank_at(self, config: SmoaConfig, site: Site) -> int:
        return _variant(config).rank_at(config, site)

    def shapes(self, config: SmoaConfig, site: Site) -> dict[str, tuple[int, ...]]:
        return _variant(config).shapes(config, site)

    def dtype(self, name: str, site: Site) -> torch.dtype:
        return torch.int32 if name in {"cuts", "order"} else super().dtype(name, site)

    def bases(self, config: SmoaConfig, sites: Sequence[Site], weight: WeightReader) -> Bases:
        return _variant(config).bases(config, sites, weight)

    def kept(self, config: SmoaConfig, site: Site, bases: Tensors, weight: torch.Tensor | None) -> Tensors:
        return _variant(config).kept(config, weight)

    def trainables(self, config: SmoaConfig, site: Site, frozen: Tensors) -> Tensors:
        return _variant(config).trainables(config, site)

    def derived(self, config: SmoaConfig, tensors: Tensors, weight: Callable[[], torch.Tensor]) -> Tensors:
        return _variant(config).derived(config, tensors, weight())

    def delta(self, config: SmoaConfig, tensors: Tensors, weight: torch.Tensor | None, module: str = "") -> Delta:
        if weight is None:
            raise MethodError("SMoA needs the base weight that it multiplies")
        return _variant(config).delta(config, tensors, weight)

    def check(self, bases: Tensors) -> torch.Tensor:
        """A digest of the order, `(2,)`: of whole numbers nothing is equal up to rounding."""
        digest = hashlib.sha256(bases["order"].cpu().numpy().astype("<i4").tobytes()).digest()
        return torch.tensor([int.from_bytes(digest[start : start + 8], "little") >> 1 for start in (0, 8)])

    def agrees(self, check: torch.Tensor, bases: Tensors) -> bool:
        return torch.equal(check.cpu(), self.check(bases))


def _variant(config: SmoaConfig) -> Variant:
    assert config.variant is not None
    return VARIANTS[config.variant]


def block_order(weight: torch.Tensor, groups: int, exact: bool = False) -> torch.Tensor:
    """Return which block each row, then each column, of a weight is in: int32, as stored.

    Args:
        weight: `(out, in)`.
        groups: K.
        exact: as for `spectral_scores`.
    """
    if groups == 1:
        return pack_labels(torch.zeros(sum(weight.shape), dtype=torch.int64), groups)
    labels = [block_labels(scores, groups) for scores in spectral_scores(weight, exact)]
    return pack_labels(torch.cat(labels), groups)


def split_rank(rank: int, groups: int) -> list[int]:
    """`rank` over `groups` as evenly as possible, the first groups taking the remainder."""
    return part_sizes(rank, groups)


METHODS = {"smoa": SMoA(SMOA)}
