"""LoHa (arXiv 2108.06098): `dW = s (w1_a w1_b) * (w2_a w2_b)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import TensorType
from surgery.adapters.types.patterns import factor_pair, rank_scale
from surgery.deltas.operators import Delta
from surgery.deltas.products import HadamardProduct
from surgery.errors import AdapterError
from surgery.system.tensors import TensorMap

__all__ = ["LOHA", "TUCKER"]

TUCKER = "a convolution in Tucker form"


def _loha(config: Mapping[str, Any], module: str, tensors: TensorMap, weight: torch.Tensor | None) -> Delta:
    """`s (w1_a w1_b) * (w2_a w2_b)`."""
    first = factor_pair(module, tensors, "hada_w1_a", "hada_w1_b")
    second = factor_pair(module, tensors, "hada_w2_a", "hada_w2_b")
    if first.shape != second.shape:
        raise AdapterError(f"{module}: hada_w1 {first.shape} and hada_w2 {second.shape} are of different shapes")
    return HadamardProduct(first, second, rank_scale(config, module))


LOHA = TensorType(
    "LOHA",
    "LoHa",
    layouts=(frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
    formula=_loha,
    paper="arXiv 2108.06098",
    change="s (B1 A1) * (B2 A2)",
    refused={"hada_t1": TUCKER, "hada_t2": TUCKER},
    thin=False,
)
