"""IniLoRA and its -alpha and -beta variants (arXiv 2510.03731): `dW = s (B A - B0 A0)`, starting at `A = A0, B = B0`.

The reference fits `s B0 A0` to the weight with 20,000 steps of Adam. The minimum of that objective is the truncated
singular value decomposition (Eckart and Young), which is computed here directly, with balanced factors, to which
small-start gradient descent would converge. The residual `W - s B0 A0` is never written: the base stays as it is,
and `- s B0 A0` is a part of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from surgery.deltas.operators import Delta, LowRank, Sum
from surgery.errors import MethodError
from surgery.linalg.low_rank import truncated_svd
from surgery.linalg.seeded import generator_for, kaiming_normal, normal
from surgery.methods.base import (
    Bases,
    OwnConfig,
    OwnMethod,
    Role,
    Spec,
    WeightReader,
    capped_rank_note,
    positive_rank,
)
from surgery.methods.catalogue import INILORA, INILORA_ALPHA, INILORA_BETA, MethodInfo
from surgery.models.sites import Site
from surgery.system.tensors import Tensors

ALPHA_STD = 0.5


@dataclass
class IniloraConfig(OwnConfig):
    """Configuration of an `INILORA` adapter.

    Attributes:
        r: rank, capped at min(in, out) of each layer.
        lora_alpha: the scale is `lora_alpha / r`.
        variant: what A0 and B0 are: `svd`, `alpha` (Gaussian, standard deviation 0.5) or `beta` (Kaiming-normal).
    """

    info: ClassVar[MethodInfo] = INILORA
    r: int = field(default=8, metadata={"help": "Rank."})
    lora_alpha: float = field(default=8, metadata={"help": "The scale is lora_alpha / r."})
    variant: str = field(default="svd", metadata={"help": "Start of A and B: svd, alpha or beta."})

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_rank(self.r)
        if self.variant not in {"svd", "alpha", "beta"}:
            raise MethodError(f"IniLoRA has variants svd, alpha and beta, not {self.variant!r}")
        if not 0 < self.lora_alpha < math.inf:
            raise MethodError(f"alpha must be positive and finite, got {self.lora_alpha}")

    @property
    def scaling(self) -> float:
        """`s`."""
        return self.lora_alpha / self.r


class IniLoRA(OwnMethod):
    """The three variants: they differ in A0 and B0 alone."""

    config_class = IniloraConfig
    specs = (
        Spec("A", Role.TRAINABLE),
        Spec("B", Role.TRAINABLE),
        Spec("A0", Role.BASE),
        Spec("B0", Role.BASE),
    )

    def __init__(self, info: MethodInfo, variant: str) -> None:
        super().__init__(info)
        self.variant = variant

    def make_config(self, options: dict[str, Any], common: dict[str, Any]) -> IniloraConfig:
        rank = positive_rank(options.get("rank", self.info.rank))
        alpha = options.get("alpha")
        return IniloraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            variant=self.variant,
            store_bases=options.get("store_bases", True),
            **common,
        )

    def notes(self, config: IniloraConfig, sites: Sequence[Site]) -> list[str]:
        return super().notes(config, sites) + capped_rank_note(config.r, sites)

    def shapes(self, config: IniloraConfig, site: Site) -> dict[str, tuple[int, ...]]:
        rank = min(config.r, site.max_rank)
        A, B = (rank, site.in_features), (site.out_features, rank)
        return {"A": A, "B": B, "A0": A, "B0": B, "check": (2, 9)}

    def bases(self, config: IniloraConfig, sites: Sequence[Site], weight: WeightReader) -> Bases:
        return Bases(own=[dict(zip(("B0", "A0"), _start(config, site, weight), strict=True)) for site in sites])

    def approximation(self, config: IniloraConfig, tensors: Tensors) -> Delta | None:
        if config.variant != "svd" or "B" not in tensors:
            return None
        return LowRank(tensors["B"], tensors["A"], config.scaling)  # at the start, A is A0 and B is B0

    def trainables(self, config: IniloraConfig, site: Site, frozen: Tensors) -> Tensors:
        return {"A": frozen["A0"].clone(), "B": frozen["B0"].clone()}

    def delta(self, config: IniloraConfig, tensors: Tensors, weight: torch.Tensor | None, module: str = "") -> Delta:
        return Sum(
            [
                (config.scaling, LowRank(tensors["B"], tensors["A"])),
                (-config.scaling, LowRank(tensors["B0"], tensors["A0"])),
            ]
        )

    def reads_weights(self, config: IniloraConfig) -> bool:
        # In a live model the three variants are one PEFT type, so the configuration says which it is.
        return config.variant == "svd"

    def needs_base(self, config: IniloraConfig) -> bool:
        return config.variant == "svd" and not config.store_bases


def _start(config: IniloraConfig, site: Site, weight: WeightReader) -> tuple[torch.Tensor, torch.Tensor]:
    """`B0 (out, r)` and `A0 (r, in)`, float32."""
    rank = min(config.r, site.max_rank)
    if config.variant == "svd":
        # Factors that will be computed again elsewhere are computed in double precision, so that rounding on the
        # other machine does not show in them.
        matrix = weight(site) if config.store_bases else weight(site).double()
        B0, A0 = (factor.float() for factor in truncated_svd(matrix, rank, config.seed).balanced())
        # s B0 A0 is the approximation, so the factors absorb s.
        return B0 / config.scaling**0.5, A0 / config.scaling**0.5
    generator = generator_for(config.seed, site.key)
    A_shape, B_shape = (rank, site.in_features), (site.out_features, rank)
    if config.variant == "alpha":
        A0 = normal(A_shape, ALPHA_STD, generator)
        return normal(B_shape, ALPHA_STD, generator), A0
    A0 = kaiming_normal(A_shape, generator)
    return kaiming_normal(B_shape, generator), A0


METHODS = {
    "inilora": IniLoRA(INILORA, "svd"),
    "inilora-alpha": IniLoRA(INILORA_ALPHA, "alpha"),
    "inilora-beta": IniLoRA(INILORA_BETA, "beta"),
}
