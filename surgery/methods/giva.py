"""GiVA (arXiv 2604.21901): `dW = diag(o) B diag(s) A` with frozen bases that the loss's gradient chose.

A holds the leading right singular vectors of the gradient of the task's loss with respect to the layer's weight, so
that the first steps of training move along what the gradient wants; B is random, or the gradient's left singular
vectors. `o = 0` makes the start a weight change of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from surgery.deltas.operators import INPUTS, OUTPUTS, Delta, Gain, LowRank, Sum
from surgery.errors import AdapterError, MethodError
from surgery.linalg.low_rank import TruncatedSVD
from surgery.linalg.seeded import generator_for, normal
from surgery.methods.base import (
    Bases,
    OwnConfig,
    OwnMethod,
    Role,
    Spec,
    WeightReader,
    positive_rank,
)
from surgery.methods.catalogue import GIVA, MethodInfo
from surgery.models.sites import CONVOLUTION, EMBEDDING, LINEAR, Site
from surgery.system.tensors import Tensors

# What B is: variant -> whether a seed gives it.
VARIANTS = {"vr": True, "vrurand": True, "vru2r": False, "vrur": False}

NO_GRADIENT = (
    "the start of GiVA needs the gradient of a loss: make it with surgery init --method giva --data FILE, or "
    "surgery.init(model, 'giva', out, data=batches), and load that"
)

__all__ = ["VARIANTS", "GiVA", "GivaConfig", "GradientSource", "heights_of", "parts_of"]


@dataclass
class GivaConfig(OwnConfig):
    """Configuration of a `GIVA` adapter.

    Attributes:
        r: rank, capped at min(in, out) of each layer (each part of a fused one), for `vru2r` at half of that.
        variant: what B is: `vr` random orthonormal columns, `vrurand` Gaussian, `vrur` the left singular vectors
            that belong to A, `vru2r` the r after these.
        packed: of an adapter that was compressed from another, by module: `[out, in, rank]`. A and B are integers,
            which the file holds as codes of few bits; s is their scale, and o is 1 until it is trained.
        kinds: of a packed adapter: what its layers are that are no linears, by module.
        gains: of a packed adapter: what the gains of its layers are on, by module: `rows` of the base weight, `outputs`
            of the layer (rows and bias), or `inputs`; a layer that is not here has none.
        bits: of a packed adapter: 16 or 32 where A and B are plain floats, else the most bits of a code, or `auto`.
        split: fused weights that hold several matrices one above the other: the end of the module's name -> their
            heights.
    """

    info: ClassVar[MethodInfo] = GIVA
    r: int = field(default=8, metadata={"help": "Rank."})
    variant: str = field(default="vr", metadata={"help": f"What B is: {', '.join(VARIANTS)}."})
    packed: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "[out, in, rank] of layers whose factors are integers, stored as codes."}
    )
    kinds: dict[str, str] | None = field(
        default=None, metadata={"help": "Of packed layers that are no linears: embedding, convolution 3x3, expert."}
    )
    gains: dict[str, str] | None = field(
        default=None, metadata={"help": "Of packed layers with gains on the base weight: rows, outputs, inputs."}
    )
    bits: int | str | None = field(
        default=None,
        metadata={"help": "Of packed factors: 16 or 32 for plain floats, else the most bits of a code."},
    )
    split: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Heights of the parts of fused weights, by the end of the module's name."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.gains and self.r == 0):  # gains alone
            positive_rank(self.r)
        if self.variant not in VARIANTS:
            raise MethodError(f"GiVA has variants {', '.join(VARIANTS)}, not {self.variant!r}")
        if not self.store_bases and not VARIANTS[self.variant]:
            raise MethodError(
                f"variant {self.variant} takes B from the gradient, which is not there when the adapter is loaded: "
                "store the bases, or use variant vr"
            )

    def rank_of(self, height: int, width: int) -> int:
        """The rank of a `(height, width)` part: the left vectors of `vru2r` leave room for two sets of them."""
        largest = min(height, width)
        return min(self.r, max(largest // 2, 1) if self.variant == "vru2r" else largest)


class GradientSource:
    """What the start of GiVA is computed from: gradients, where other methods read weights.

    Args:
        svds: by module name, the leading singular triplets of the gradient of each part of the layer.
    """

    def __init__(self, svds: dict[str, list[TruncatedSVD]]) -> None:
        self.svds = svds

    def __call__(self, site: Site) -> torch.Tensor:
        raise NotImplementedError("GiVA reads no weights")

    def each(self, sites: Sequence[Site]) -> Iterator[torch.Tensor]:
        raise NotImplementedError("GiVA reads no weights")


class GiVA(OwnMethod):
    """Vectors on bases from the gradient."""

    high = ("o", "B")
    # Those that are no linears in packed adapters alone.
    layers = (LINEAR, EMBEDDING, CONVOLUTION, "fused experts", "single tokens")
    config_class = GivaConfig
    specs = (
        Spec("o", Role.TRAINABLE),
        Spec("s", Role.TRAINABLE),
        Spec("A", Role.KEPT),
        Spec("B", Role.BASE),
        # Of packed adapters with gains: these less one, and the step of their grid, 0 off any grid.
        Spec("g", Role.TRAINABLE),
        Spec("t", Role.KEPT),
    )
    keeps_from_weights = False

    def specs_for(self, config: Any) -> tuple[Spec, ...]:
        return self.specs if self.gains(config) else self.specs[:4]

    def gains(self, config: Any) -> dict[str, str]:
        return (config.get("gains") if isinstance(config, Mapping) else config.gains) or {}

    def uses_weight(self, config: Any) -> bool:
        return bool(self.gains(config))

    def complete(self, options: dict[str, Any], sites: Sequence[Site], model_config: Any) -> dict[str, Any]:
        wanted = {**default_split(model_config), **(options.get("split") or {})}
        return {**options, "split": _heights(wanted, sites, set(options.get("split") or ()))}

    def gradient_parts(self, config: GivaConfig, sites: Sequence[Site]) -> tuple[int, dict[str, list[int]]]:
        heights = {site.module: heights_of(config, site.module, site.out_features) for site in sites}
        return config.r * (2 if config.variant == "vru2r" else 1), heights

    def make_config(self, options: dict[str, Any], common: dict[str, Any]) -> GivaConfig:
        return GivaConfig(
            r=positive_rank(options.get("rank", self.info.rank)),
            variant=options.get("variant", "vr"),
            split=options.get("split") or None,
            store_bases=options.get("store_bases", True),
            **common,
        )

    def notes(self, config: GivaConfig, sites: Sequence[Site]) -> list[str]:
        least = [min(rank for _, rank in parts_of(config, site)) for site in sites]
        capped = [rank for rank in least if rank < config.r]
        if not capped:
            return super().notes(config, sites)
        limit = "min(in, out) / 2" if config.variant == "vru2r" else "min(in, out)"
        note = f"rank {config.r} is capped at {limit} in {len(capped)} of {len(sites)} layers (down to {min(capped)})"
        return [*super().notes(config, sites), note]

    def rank_at(self, config: GivaConfig, site: Site) -> int:
        return max(rank for _, rank in parts_of(config, site))

    def shapes(self, config: GivaConfig, site: Site) -> dict[str, tuple[int, ...]]:
        parts = parts_of(config, site)
        total, widest = sum(rank for _, rank in parts), max(rank for _, rank in parts)
        return {
            "o": (site.out_features,),
            "s": (total,),
            "A": (total, site.in_features),
            "B": (site.out_features, widest),
            "check": (1, 9),
            **_gain_shapes(config, site.module, site.out_features, site.in_features),
        }

    def file_shapes(self, config: GivaConfig, site: Site, tensors: Tensors) -> dict[str, tuple[int, ...]]:
        if not config.packed:
            return self.shapes(config, site)
        A, B = tensors["A"], tensors["B"]  # unpacked, and a pair
        rank = A.shape[0] if A.ndim else 0
        shapes = {"A": tuple(A.shape), "B": (B.shape[0], rank), "s": (rank,), "o": (B.shape[0],)}
        return {**shapes, **_gain_shapes(config, site.module, B.shape[0], A.shape[-1])}

    def bases(self, config: GivaConfig, sites: Sequence[Site], weight: WeightReader) -> Bases:
        """A and B at the start. An adapter that is loaded without its B has no gradient: B comes from its seed."""
        if not isinstance(weight, GradientSource):
            if config.store_bases:
                raise AdapterError(NO_GRADIENT)
            return Bases(own=[{"B": _random_B(config, site)} for site in sites])
        own = []
        for site in sites:
            svds = weight.svds[site.module]
            ranks = [rank for _, rank in parts_of(config, site)]
            A = torch.cat([svd.Vh[:rank] for svd, rank in zip(svds, ranks, strict=True)])
            seeded = VARIANTS[config.variant]
            own.append({"A": A, "B": _random_B(config, site) if seeded else _left_vectors(config, svds, ranks)})
        return Bases(own=own)

    def trainables(self, config: GivaConfig, site: Site, frozen: Tensors) -> Tensors:
        if "A" not in frozen:
            raise AdapterError(NO_GRADIENT)
        return {"o": torch.zeros(site.out_features), "s": torch.ones(frozen["A"].shape[0])}

    def delta(self, config: GivaConfig, tensors: Tensors, weight: torch.Tensor | None, module: str = "") -> Delta:
        o, s, A, B = (tensors[name] for name in ("o", "s", "A", "B"))
        heights = heights_of(config, module, B.shape[0])
        if len(heights) > 1:
            ranks = [config.rank_of(height, A.shape[1]) for height in heights]
            blocks = [block[:, :rank] for block, rank in zip(B.split(heights), ranks, strict=True)]
            B = torch.block_diag(*blocks)
        change = LowRank(o[:, None] * B, s[:, None] * A)
        kind = (config.gains or {}).get(module)
        if kind is None:
            return change
        return Sum([(1.0, Gain.of_kind(kind, tensors["g"], weight, change.shape)), (1.0, change)])

    def output_bias(self, config: Any, module: str, tensors: Tensors, bias: torch.Tensor | None) -> torch.Tensor | None:
        if bias is None or self.gains(config).get(module) != OUTPUTS:
            return None
        return tensors["g"].float() * bias.float()


def _gain_shapes(config: GivaConfig, module: str, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of `g` and `t` at a layer of an adapter with gains, empty ones at a layer that has none."""
    if not config.gains:
        return {}
    kind = config.gains.get(module)
    return {"g": (0 if kind is None else width if kind == INPUTS else height,), "t": (0 if kind is None else 1,)}


def default_split(model_config: Any) -> dict[str, int | list[int]]:
    """The fused layers of model types that we know: the end of the module's name -> parts, or their heights."""
    kind = getattr(model_config, "model_type", None)
    if kind == "gpt2":
        return {"attn.c_attn": 3, "crossattention.c_attn": 2}
    if kind in {"glm", "glm4"}:
        return {"gate_up_proj": 2}
    if kind == "phi3":
        heads = model_config.num_attention_heads
        size = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
        shared = model_config.num_key_value_heads * size
        return {"qkv_proj": [heads * size, shared, shared], "gate_up_proj": 2}
    return {}


def _heights(wanted: dict[str, int | list[int]], sites: Sequence[Site], asked: set[str]) -> dict[str, list[int]]:
    """Heights of the parts for each entry that matches a layer; what was asked for goes before what is known.

    Raises:
        MethodError: an entry that was asked for matches nothing or does not divide what it matches.
    """
    found: dict[str, list[int]] = {}
    for name, parts in wanted.items():
        matched = [site for site in sites if _is_called(site.module, name)]
        if name not in asked:
            matched = [site for site in matched if not any(_is_called(site.module, other) for other in asked)]
        elif not matched:
            raise MethodError(f"split {name}: no adapted layer is called so")
        for site in matched:
            heights = _divided(site, parts)
            if found.setdefault(name, heights) != heights:
                raise MethodError(f"split {name}: {site.module} has another height than the first such layer; name one")
    # Longer names are more special, and the first that fits is taken.
    return {name: found[name] for name in sorted(found, key=len, reverse=True)}


def _is_called(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _divided(site: Site, parts: int | list[int]) -> list[int]:
    if isinstance(parts, int):
        if parts < 1 or site.out_features % parts:
            raise MethodError(f"split: {site.module} has {site.out_features} outputs, which {parts} does not divide")
        return [site.out_features // parts] * parts
    if sum(parts) != site.out_features or min(parts) < 1:
        raise MethodError(f"split: {site.module} has {site.out_features} outputs, not {' + '.join(map(str, parts))}")
    return list(parts)


def heights_of(config: GivaConfig, module: str, out_features: int) -> list[int]:
    """The heights of a layer's parts; one part for a layer that is not split.

    Raises:
        AdapterError: they do not add up to the layer's height.
    """
    for name, heights in (config.split or {}).items():
        if _is_called(module, name):
            if sum(heights) != out_features:
                raise AdapterError(f"{module}: split into {heights}, but has {out_features} outputs")
            return list(heights)
    return [out_features]


def parts_of(config: GivaConfig, site: Site) -> list[tuple[int, int]]:
    """Height and rank of every part of a layer."""
    if config.packed:
        if site.module not in config.packed:
            raise AdapterError(f"{site.module}: is adapted, but the configuration has no packed factors for it")
        return [(site.out_features, config.packed[site.module][2])]
    heights = heights_of(config, site.module, site.out_features)
    return [(height, config.rank_of(height, site.in_features)) for height in heights]


def _random_B(config: GivaConfig, site: Site) -> torch.Tensor:
    """B of the variants that need no gradient: `(out, widest rank)`, float32, by seed and layer."""
    parts = parts_of(config, site)
    widest = max(rank for _, rank in parts)
    generator = generator_for(config.seed, site.key)
    blocks = []
    for height, rank in parts:
        block = normal((height, rank), 1.0, generator)
        if config.variant == "vr":
            # In double precision, so that rounding elsewhere does not show.
            block = torch.linalg.qr(block.double())[0].float()
        blocks.append(_widened(block, widest))
    return torch.cat(blocks)


def _left_vectors(config: GivaConfig, svds: Sequence[TruncatedSVD], ranks: Sequence[int]) -> torch.Tensor:
    """B from the gradient's left singular vectors: those of A's directions, or the next ones."""
    blocks = []
    for svd, rank in zip(svds, ranks, strict=True):
        # A layer with a single output or input has no second vector.
        first = rank if config.variant == "vru2r" and svd.U.shape[1] >= 2 * rank else 0
        blocks.append(svd.U[:, first : first + rank])
    return torch.cat([_widened(block, max(ranks)) for block in blocks])


def _widened(block: torch.Tensor, columns: int) -> torch.Tensor:
    """Zero columns up to a width that the parts of a layer share."""
    return torch.nn.functional.pad(block, (0, columns - block.shape[1]))


METHODS = {"giva": GiVA(GIVA)}
