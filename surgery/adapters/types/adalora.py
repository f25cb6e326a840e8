"""AdaLoRA (arXiv 2303.10512) as PEFT computes it: `dW = s B (A * E) / (init_r + 1e-5)`, exactly a LoRA.

Training prunes ranks layer by layer, down to none; the divisor stays the rank that the layers began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import TensorType
from surgery.adapters.types.config_rules import A_NUMBER, A_RANK, is_table
from surgery.adapters.types.patterns import number_of
from surgery.deltas.operators import LowRank
from surgery.errors import AdapterError
from surgery.system.tensors import TensorMap

__all__ = ["ADALORA"]

# PEFT adds it to the divisor.
EPSILON = 1e-5


def _adalora(config: Mapping[str, Any], module: str, tensors: TensorMap, weight: torch.Tensor | None) -> LowRank:
    """Return `s B (A * E) / (init_r + 1e-5)`."""
    A, B, E = (tensors[name].float() for name in ("lora_A", "lora_B", "lora_E"))
    if not A.shape[0] == B.shape[1] == E.shape[0] or E.shape[1] != 1:
        raise AdapterError(
            f"{module}: lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)} and lora_E {tuple(E.shape)} do not fit "
            "each other"
        )
    started = number_of(config, "init_r", 12)
    if not started > 0:
        raise AdapterError(f"{module}: adapter_config.json says init_r {started:g}, expected a positive rank")
    alpha = number_of(config, "lora_alpha", 8)
    return LowRank(B, A * E, (alpha if alpha > 0 else started) / (started + EPSILON))


ADALORA = TensorType(
    "ADALORA",
    "AdaLoRA",
    layouts=(frozenset({"lora_A", "lora_B", "lora_E"}),),
    formula=_adalora,
    paper="arXiv 2303.10512",
    change="s B (A * E) / init_r",
    prefix="lora_",
    starts_idle=True,
    bias_setting="lora_only",
    may_be_empty=True,
    rules={"lora_alpha": A_NUMBER, "init_r": A_RANK, "rank_pattern": (is_table, "an object of lists of switches")},
)
