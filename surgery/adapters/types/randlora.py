"""RandLoRA (arXiv 2502.00987): a sum of scaled random low-rank products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.types.base import Needs, Tensors, TensorType
from surgery.adapters.types.config_rules import A_NUMBER, A_SEED, A_SWITCH
from surgery.adapters.types.patterns import number_of
from surgery.deltas.operators import Delta, LowRank
from surgery.errors import AdapterError

__all__ = ["RANDLORA"]

BASES = frozenset({"randlora_A", "randlora_B"})


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
    scale = number_of(config, "randlora_alpha", 640) / rank
    return LowRank(wide, narrow, scale) if columns == small else LowRank(narrow.T, wide.T, scale)


RANDLORA = TensorType(
    "RANDLORA",
    "RandLoRA",
    layouts=(frozenset({"randlora_lambda", "randlora_gamma"}) | BASES,),
    formula=_randlora,
    paper="arXiv 2502.00987",
    change="s sum_n B_n diag(lambda_n) A diag(gamma_n)",
    dimensions=dict.fromkeys(BASES, 3),
    base_needs=Needs.SHAPE,
    shared=BASES,
    incomplete="where the bases are not stored, save it with save_projection=True on the machine that made it",
    rules={"randlora_alpha": A_NUMBER, "projection_prng_key": A_SEED, "save_projection": A_SWITCH},
)
