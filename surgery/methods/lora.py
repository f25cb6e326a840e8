"""LoRA (arXiv 2106.09685), PEFT's own type: `dW = s B A`. Read, not made: it has no start of its own here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from surgery.errors import AdapterError
from surgery.linalg.delta import LowRank

__all__ = ["lora_delta", "scaling_of"]

A_NAME, B_NAME = "lora_A.weight", "lora_B.weight"


def lora_delta(config: Mapping[str, Any], module: str, tensors: Mapping[str, torch.Tensor]) -> LowRank:
    """The weight change of one layer of a stock LoRA.

    Args:
        config: `adapter_config.json`.
        module: the layer's name.
        tensors: its tensors, by their names after the module's.

    Raises:
        AdapterError: the layer is of a variant whose change is not `s B A` (DoRA, embeddings).
    """
    if config.get("use_dora") or any("magnitude" in name for name in tensors):
        raise AdapterError(f"{module}: is a DoRA layer, whose change depends on the norms of the base weight")
    if A_NAME not in tensors or B_NAME not in tensors:
        raise AdapterError(f"{module}: expected {A_NAME} and {B_NAME}, found {', '.join(sorted(tensors))}")
    A, B = tensors[A_NAME], tensors[B_NAME]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise AdapterError(f"{module}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are no pair of factors")
    return LowRank(B.float(), A.float(), scaling_of(config, module, int(A.shape[0])))


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`s` of one layer: alpha over the rank, or over its root for rsLoRA, with the layer's own alpha if it has one."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # As PEFT matches the keys of its patterns.
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
