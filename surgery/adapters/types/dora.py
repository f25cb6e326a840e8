"""DoRA (arXiv 2402.09353), a variant of PEFT's LoRA: `W + dW = diag(m / |W + s B A|_row) (W + s B A)`.

With `g = m / |W + s B A|_row` the change is a gain on the rows of W plus a low-rank one,
`diag(g - 1) W + diag(g) s B A`. The bias of the layer stays outside of the gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import Needs, TensorType
from surgery.adapters.types.lora import (
    A_NAME,
    B_NAME,
    EMBEDDING_NAMES,
    LORA_RULES,
    lora_delta,
    lora_form,
    refuse_variants,
)
from surgery.deltas.operators import Delta, Gain, LowRank, Sum
from surgery.errors import AdapterError
from surgery.models.sites import CONVOLUTION, EMBEDDING, LINEAR
from surgery.system.tensors import TensorMap

__all__ = ["DORA"]

MAGNITUDE = "lora_magnitude_vector"


def _dora(config: Mapping[str, Any], module: str, tensors: TensorMap, weight: torch.Tensor | None) -> Delta:
    """Return `diag(g - 1) W + diag(g) s B A`."""
    change = lora_delta(config, module, tensors)
    magnitude = tensors[MAGNITUDE].reshape(-1)  # (1, out, 1, 1) on a convolution
    if weight is None:
        raise AdapterError(f"{module}: a DoRA change depends on the norms of the base weight's rows; give it")
    if change.shape != tuple(weight.shape) or magnitude.shape != weight.shape[:1]:
        raise AdapterError(
            f"{module}: its factors make {change.shape} and its magnitudes are {tuple(magnitude.shape)}, the base "
            f"weight is {tuple(weight.shape)}"
        )
    norms = torch.linalg.vector_norm(weight + change.dense(), dim=1)
    if bool((norms == 0).any()):
        raise AdapterError(f"{module}: a row of W + s B A is zero, so that DoRA's gain m / |row| is not defined")
    gain = magnitude / norms
    return Sum([(1.0, Gain(weight, gain - 1)), (1.0, LowRank(gain[:, None] * change.B, change.A, change.scale))])


DORA = TensorType(
    "LORA",
    "DoRA",
    layouts=(frozenset({A_NAME, B_NAME, MAGNITUDE}), frozenset({*EMBEDDING_NAMES, MAGNITUDE})),
    formula=_dora,
    paper="arXiv 2402.09353",
    change="diag(g - 1) W + diag(g) s B A",
    prefix="lora_",
    starts_idle=True,
    bias_setting="lora_only",
    dimensions={MAGNITUDE: 1},
    base_needs=Needs.VALUES,
    thin=False,
    as_gains=True,
    rules=LORA_RULES,
    when=lambda config: bool(config.get("use_dora")),
    check=refuse_variants,
    forms=lora_form,
    layers=(LINEAR, EMBEDDING, CONVOLUTION),
)
