"""An adapter type in one file: each row of a weight is moved by one number, `dW = s 1^T`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import Needs, TensorType
from surgery.deltas.operators import LowRank
from surgery.errors import AdapterError
from surgery.system.tensors import TensorMap


def stripes(config: Mapping[str, Any], module: str, tensors: TensorMap, weight: torch.Tensor | None) -> LowRank:
    """Return `s 1^T`, as wide as the base weight."""
    if weight is None:
        raise AdapterError(f"{module}: a STRIPES file does not say how wide the layer is; give its base weight")
    return LowRank(tensors["stripes_s"][:, None], torch.ones(1, weight.shape[1]))


STRIPES = TensorType(
    "STRIPES",
    "Stripes",
    layouts=(frozenset({"stripes_s"}),),
    formula=stripes,
    paper="this example",
    change="s 1^T",
    dimensions={"stripes_s": 1},
    base_needs=Needs.SHAPE,
)
