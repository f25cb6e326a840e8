"""HiRA (ICLR 2025): `dW = W * (B A)`, elementwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import Needs, TensorType
from surgery.adapters.types.patterns import factor_pair
from surgery.deltas.operators import Delta, Hadamard
from surgery.errors import AdapterError
from surgery.system.tensors import TensorMap

__all__ = ["HIRA"]


def _hira(config: Mapping[str, Any], module: str, tensors: TensorMap, weight: torch.Tensor | None) -> Delta:
    """`W * (B A)`."""
    factors = factor_pair(module, tensors, "hira_B", "hira_A")
    if weight is None:
        raise AdapterError(f"{module}: a HiRA change is a multiple of the base weight; give it")
    if factors.shape != tuple(weight.shape):
        raise AdapterError(f"{module}: its factors make {factors.shape}, the base weight is {tuple(weight.shape)}")
    return Hadamard(weight, [], [(factors.B, factors.A)])


HIRA = TensorType(
    "HIRA",
    "HiRA",
    layouts=(frozenset({"hira_A", "hira_B"}),),
    formula=_hira,
    paper="ICLR 2025",
    change="W * (B A)",
    prefix="hira_",
    starts_idle=True,
    refused={"hira_embedding_A": "a HiRA on an embedding", "hira_embedding_B": "a HiRA on an embedding"},
    base_needs=Needs.VALUES,
    thin=False,
)
