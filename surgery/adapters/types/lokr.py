"""LoKr (arXiv 2212.10650): `dW = s w1 ⊗ w2`, each of them whole or in two factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import TensorType
from surgery.adapters.types.loha import TUCKER
from surgery.adapters.types.patterns import factor_pair, rank_scale
from surgery.deltas.operators import Delta
from surgery.deltas.products import Kronecker, as_low_rank
from surgery.models.sites import CONVOLUTION, LINEAR, Form
from surgery.system.tensors import TensorMap

__all__ = ["LOKR"]

SIDES = [[frozenset({f"lokr_w{side}"}), frozenset({f"lokr_w{side}_a", f"lokr_w{side}_b"})] for side in (1, 2)]


def _lokr(config: Mapping[str, Any], module: str, tensors: TensorMap, weight: torch.Tensor | None) -> Delta:
    """`s w1 ⊗ w2`, each of them whole or in two factors."""
    sides = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in tensors:
            # A kernel's places are the fastest columns of w2, and so of the product.
            sides.append(as_low_rank(tensors[name].flatten(1)))
        else:
            sides.append(factor_pair(module, tensors, f"{name}_a", f"{name}_b"))
    return Kronecker(sides[0], sides[1], rank_scale(config, module))


def lokr_form(config: Mapping[str, Any], module: str, tensors: TensorMap) -> Form:
    """Return the form of a convolution whose w2 is whole; of others the base knows."""
    whole = tensors.get("lokr_w2")
    known = whole is not None and whole.ndim == 4
    return Form(CONVOLUTION, tuple(int(size) for size in whole.shape[2:])) if known and whole is not None else Form()


LOKR = TensorType(
    "LOKR",
    "LoKr",
    layouts=tuple(left | right for left in SIDES[0] for right in SIDES[1]),
    formula=_lokr,
    paper="arXiv 2212.10650",
    change="s w1 ⊗ w2",
    prefix="lokr_",
    starts_idle=True,
    refused={"lokr_t2": TUCKER},
    thin=False,
    forms=lokr_form,
    form_by_base=True,
    layers=(LINEAR, CONVOLUTION),
)
