"""LoHa (arXiv 2108.06098): `dW = s (w1_a w1_b) * (w2_a w2_b)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import TensorType
from surgery.adapters.types.patterns import factor_pair, rank_scale
from surgery.deltas.operators import Delta, Dense
from surgery.deltas.products import HadamardProduct
from surgery.errors import AdapterError
from surgery.models.sites import CONVOLUTION, LINEAR, Form
from surgery.system.tensors import TensorMap

__all__ = ["LOHA", "TUCKER"]

TUCKER = "a convolution in Tucker form"
PLAIN = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})


def _loha(config: Mapping[str, Any], module: str, tensors: TensorMap, weight: torch.Tensor | None) -> Delta:
    """`s (w1_a w1_b) * (w2_a w2_b)`."""
    if "hada_t1" in tensors:
        return Dense(tucker(module, tensors, "1") * tucker(module, tensors, "2") * rank_scale(config, module))
    first = factor_pair(module, tensors, "hada_w1_a", "hada_w1_b")
    second = factor_pair(module, tensors, "hada_w2_a", "hada_w2_b")
    if first.shape != second.shape:
        raise AdapterError(f"{module}: hada_w1 {first.shape} and hada_w2 {second.shape} are of different shapes")
    return HadamardProduct(first, second, rank_scale(config, module))


def tucker(module: str, tensors: TensorMap, side: str) -> torch.Tensor:
    """Return a factor in Tucker form, `a^T t b` for each place of the kernel, as a matrix `(out, in * kernel)`."""
    t, a, b = (tensors[f"hada_{name}"] for name in (f"t{side}", f"w{side}_a", f"w{side}_b"))
    if t.ndim != 4 or a.ndim != 2 or b.ndim != 2 or tuple(t.shape[:2]) != (a.shape[0], b.shape[0]):
        raise AdapterError(
            f"{module}: hada_t{side} {tuple(t.shape)}, hada_w{side}_a {tuple(a.shape)} and hada_w{side}_b "
            f"{tuple(b.shape)} do not fit each other"
        )
    return torch.einsum("ijkl,jr,ip->prkl", t, b, a).flatten(1)


def loha_form(config: Mapping[str, Any], module: str, tensors: TensorMap) -> Form:
    """Return the form of a convolution in Tucker form; of others the base knows."""
    t = tensors.get("hada_t1")
    return Form() if t is None else Form(CONVOLUTION, tuple(int(size) for size in t.shape[2:]))


LOHA = TensorType(
    "LOHA",
    "LoHa",
    layouts=(PLAIN, PLAIN | {"hada_t1", "hada_t2"}),
    formula=_loha,
    paper="arXiv 2108.06098",
    change="s (B1 A1) * (B2 A2)",
    prefix="hada_",
    starts_idle=True,
    thin=False,
    forms=loha_form,
    form_by_base=True,
    layers=(LINEAR, CONVOLUTION),
)
