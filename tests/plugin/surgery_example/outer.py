"""A method in one file: `dW = u v^T`, where v starts random and u at zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from surgery.deltas.operators import LowRank
from surgery.linalg.seeded import generator_for, normal
from surgery.methods.base import OwnConfig, OwnMethod, Role, Spec
from surgery.methods.catalogue import MethodInfo

INFO = MethodInfo(
    name="outer",
    title="Outer",
    peft_type="OUTER",
    module=__name__,
    change="u v^T",
    trains="u (out), v (in)",
    stores="nothing else",
    paper="this example",
    reads_weights=False,
)


@dataclass
class OuterConfig(OwnConfig):
    """Configuration of an `OUTER` adapter: what all our configurations hold, and nothing else."""

    info: ClassVar[MethodInfo] = INFO


class Outer(OwnMethod):
    """One outer product for each layer."""

    config_class = OuterConfig
    specs = (Spec("u", Role.TRAINABLE), Spec("v", Role.TRAINABLE))
    high, wide = ("u",), ("v",)

    def make_config(self, options: dict[str, Any], common: dict[str, Any]) -> OuterConfig:
        return OuterConfig(**common)

    def shapes(self, config: Any, site: Any) -> dict[str, tuple[int, ...]]:
        return {"u": (site.out_features,), "v": (site.in_features,)}

    def trainables(self, config: Any, site: Any, frozen: Any) -> dict[str, torch.Tensor]:
        v = normal((1, site.in_features), 0.1, generator_for(config.seed, site.key))[0]
        return {"u": torch.zeros(site.out_features), "v": v}

    def delta(self, config: Any, tensors: Any, weight: torch.Tensor | None, module: str = "") -> LowRank:
        return LowRank(tensors["u"][:, None], tensors["v"][None])


METHODS = {"outer": Outer(INFO)}
