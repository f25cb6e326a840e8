"""The stock PEFT types whose weight changes are read here, all of them trained by others: how each layer is stored.

Definitions are PEFT's code (`peft.tuners`): LoRA (arXiv 2106.09685), LoHa (arXiv 2108.06098), LoKr (arXiv 2212.10650),
HiRA (ICLR 2025) and RandLoRA (arXiv 2502.00987).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surgery.adapters.lora import A_NAME, B_NAME, BIAS_NAME, lora_delta, pattern_value
from surgery.deltas.operators import Delta, Hadamard, LowRank
from surgery.deltas.products import HadamardProduct, Kronecker, as_low_rank
from surgery.errors import AdapterError

__all__ = ["REFUSED", "STOCK", "StockType"]

Tensors = Mapping[str, torch.Tensor]
# (adapter_config.json, the layer's name, its tensors in float32, its base weight in float32 or None)
Formula = Callable[[Mapping[str, Any], str, Tensors, torch.Tensor | None], Delta]


@dataclass(frozen=True)
class StockType:
    """A stock PEFT type.

    Attributes:
        title: as in the paper.
        layouts: the names that a layer's tensors can have; each layer has all of one of these sets.
        formula: its weight change.
        refused: names of tensors that make a layer another than this module reads, with what it is then.
        dimensions: of the tensors, where they are not matrices.
        reads_weight: what its weight change needs of the base weight: its values, its shape, or nothing.
        shared: names of tensors that a file may hold once, above the model, instead of with each layer.
        incomplete: what a layer that lacks tensors may be, and what to do.
    """

    title: str
    layouts: tuple[frozenset[str], ...]
    formula: Formula
    refused: Mapping[str, str]
    dimensions: Mapping[str, int]
    reads_weight: str = "nothing"
    shared: frozenset[str] = frozenset()
    incomplete: str = "the file is incomplete; save the adapter again"

    @property
    def names(self) -> frozenset[str]:
        """Every name that a tensor of a layer can have, refused ones too."""
        return frozenset().union(*self.layouts, self.refused)


def _lora(config: Mapping[str, Any], module: str, tensors: Tensors, weight: torch.Tensor | None) -> Delta:
    return lora_delta(config, module, tensors)


def _loha(config: Mapping[str, Any], module: str, tensors: Tensors, weight: torch.Tensor | None) -> Delta:
    """`s (w1_a w1_b) * (w2_a w2_b)`."""
    first = _pair(module, tensors, "hada_w1_a", "hada_w1_b")
    second = _pair(module, tensors, "hada_w2_a", "hada_w2_b")
    if first.shape != second.shape:
        raise AdapterError(f"{module}: hada_w1 {first.shape} and hada_w2 {second.shape} are of different shapes")
    return HadamardProduct(first, second, _lycoris_scale(config, module))


def _lokr(config: Mapping[str, Any], module: str, tensors: Tensors, weight: torch.Tensor | None) -> Delta:
    """`s w1 ⊗ w2`, each of them whole or in two factors."""
    sides = [
        as_low_rank(tensors[name]) if name in tensors else _pair(module, tensors, f"{name}_a", f"{name}_b")
        for name in ("lokr_w1", "lokr_w2")
    ]
    return Kronecker(sides[0], sides[1], _lycoris_scale(config, module))


def _hira(config: Mapping[str, Any], module: str, tensors: Tensors, weight: torch.Tensor | None) -> Delta:
    """`W * (B A)`."""
    factors = _pair(module, tensors, "hira_B", "hira_A")
    if weight is None:
        raise AdapterError(f"{module}: a HiRA change is a multiple of the base weight; give it")
    if factors.shape != tuple(weight.shape):
        raise AdapterError(f"{module}: its factors make {factors.shape}, the base weight is {tuple(weight.shape)}")
    return Hadamard(weight, [], [(factors.B, factors.A)])


def _randlora(config: Mapping[str, Any], module: str, tensors: Tensors, weight: torch.Tensor | None) -> Delta:
    """`s B A'` with `A' = lambda A gamma` over all bases and ranks, transposed where the layer is wider than high.

    PEFT lists the rows of A' by (rank, base) and the columns of B by (base, rank), so that ranks of different bases
    meet; what it trains and merges is that product, and so it is here.
    """
    A, B = tensors["randlora_A"], tensors["randlora_B"]
    scales, gamma = tensors["randlora_lambda"], tensors["randlora_gamma"]  # (r, n), (n, small)
    if weight is None:
        raise AdapterError(f"{module}: a RandLoRA file does not say how wide the layer is; give its base weight")
    rows, columns = weight.shape
    small, large = min(rows, columns), max(rows, columns)
    (rank, count), fits = scales.shape, gamma.shape == (scales.shape[1], small)
    if not fits or A.shape[0] != rank or A.shape[2] < small or B.shape[0] < large or B.shape[1] < count:
        raise AdapterError(f"{module}: its RandLoRA tensors do not fit a weight of {rows} x {columns}")
    # A is one for all bases.
    narrow = (scales[:, :, None] * A[:, :, :small] * gamma).flatten(0, 1)  # (r n, small)
    wide = B[:large, :count].flatten(1)  # (large, n r)
    scale = _number(config, "randlora_alpha", 640) / rank
    return LowRank(wide, narrow, scale) if columns == small else LowRank(narrow.T, wide.T, scale)


def _pair(module: str, tensors: Tensors, B_name: str, A_name: str) -> LowRank:
    B, A = tensors[B_name], tensors[A_name]
    if B.shape[1] != A.shape[0]:
        raise AdapterError(f"{module}: {B_name} {tuple(B.shape)} and {A_name} {tuple(A.shape)} are no pair of factors")
    return LowRank(B, A)


def _lycoris_scale(config: Mapping[str, Any], module: str) -> float:
    rank = pattern_value(config, "rank_pattern", module, config.get("r", 8))
    if not rank > 0:
        raise AdapterError(f"{module}: adapter_config.json says rank {rank:g}")
    return pattern_value(config, "alpha_pattern", module, config.get("alpha", 8)) / rank


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise AdapterError(f"adapter_config.json has {key} {value!r}, expected a number")
    return float(value)


_TUCKER = "a convolution in Tucker form"
_LOKR_SIDES = [[frozenset({f"lokr_w{side}"}), frozenset({f"lokr_w{side}_a", f"lokr_w{side}_b"})] for side in (1, 2)]
_BASES = frozenset({"randlora_A", "randlora_B"})

STOCK: dict[str, StockType] = {
    "LORA": StockType(
        "LoRA",
        (frozenset({A_NAME, B_NAME}), frozenset({A_NAME, B_NAME, BIAS_NAME})),
        _lora,
        {
            "lora_embedding_A": "a LoRA on an embedding",
            "lora_embedding_B": "a LoRA on an embedding",
            "lora_magnitude_vector": "a DoRA layer",
        },
        {BIAS_NAME: 1},
    ),
    "LOHA": StockType(
        "LoHa",
        (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
        _loha,
        {"hada_t1": _TUCKER, "hada_t2": _TUCKER},
        {},
    ),
    "LOKR": StockType(
        "LoKr",
        tuple(left | right for left in _LOKR_SIDES[0] for right in _LOKR_SIDES[1]),
        _lokr,
        {"lokr_t2": _TUCKER},
        {},
    ),
    "HIRA": StockType(
        "HiRA",
        (frozenset({"hira_A", "hira_B"}),),
        _hira,
        {"hira_embedding_A": "a HiRA on an embedding", "hira_embedding_B": "a HiRA on an embedding"},
        {},
        reads_weight="values",
    ),
    "RANDLORA": StockType(
        "RandLoRA",
        (frozenset({"randlora_lambda", "randlora_gamma"}) | _BASES,),
        _randlora,
        {},
        dict.fromkeys(_BASES, 3),
        reads_weight="shape",
        shared=_BASES,
        incomplete="where the bases are not stored, save it with save_projection=True on the machine that made it",
    ),
}

# Types whose weight change is known, but not from the file alone, or not as a fixed matrix.
REFUSED = {
    "ADALORA": "AdaLoRA prunes ranks while it trains; merge it with PEFT (merge_and_unload)",
    "FROD": (
        "a stock FROD file lacks U; surgery.load(adapter, base) opens it as FROD_PORTABLE, which save_pretrained writes"
    ),
}
