"""IA3 (arXiv 2205.05638): gains on the outputs of a layer, its bias included, or on the inputs of a feed-forward one.

`dW = diag(l) W - W` from a column `l (out, 1)`, or `W diag(l) - W` from a row `l (1, in)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import Needs, TensorType
from surgery.deltas.operators import Gain
from surgery.errors import AdapterError
from surgery.system.tensors import TensorMap

__all__ = ["IA3"]


def _ia3(config: Mapping[str, Any], module: str, tensors: TensorMap, weight: torch.Tensor | None) -> Gain:
    """Return the gains on the rows or the columns of W."""
    if weight is None:
        raise AdapterError(f"{module}: an IA3 change is a multiple of the base weight; give it")
    gains = tensors["ia3_l"]
    rows, columns = weight.shape
    if tuple(gains.shape) == (rows, 1):
        return Gain(weight, rows=gains[:, 0] - 1, outputs=True)
    if tuple(gains.shape) == (1, columns):
        return Gain(weight, columns=gains[0] - 1)
    raise AdapterError(f"{module}: ia3_l is {tuple(gains.shape)}, the base weight {rows} x {columns}")


def _scaled_bias(
    config: Mapping[str, Any], module: str, tensors: TensorMap, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return `(l - 1) bias` of a layer whose outputs are scaled."""
    gains = tensors["ia3_l"].float()
    if bias is None or gains.shape != (bias.shape[0], 1):
        return None
    return (gains[:, 0] - 1) * bias.float()


IA3 = TensorType(
    "IA3",
    "(IA)³",
    layouts=(frozenset({"ia3_l"}),),
    formula=_ia3,
    paper="arXiv 2205.05638",
    change="diag(l) W - W",
    prefix="ia3_",
    starts_idle=True,
    base_needs=Needs.VALUES,
    thin=False,
    bias=_scaled_bias,
    as_gains=True,
    scales_bias=True,
)
