"""RandLoRA (arXiv 2502.00987): a sum of scaled random low-rank products."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from surgery.adapters.types.base import Needs, TensorType
from surgery.adapters.types.config_rules import A_NUMBER, A_SEED, A_SWITCH
from surgery.adapters.types.patterns import number_of
from surgery.deltas.operators import Delta, LowRank
from surgery.errors import AdapterError
from surgery.models.sites import Site
from surgery.system.tensors import TensorMap

__all__ = ["RANDLORA"]

VECTORS = frozenset({"randlora_lambda", "randlora_gamma"})
BASES = frozenset({"randlora_A", "randlora_B"})


def _randlora(config: Mapping[str, Any], module: str, tensors: TensorMap, weight: torch.Tensor | None) -> Delta:
    """`s B A'` with `A' = lambda A gamma` over all bases and ranks, transposed where the layer is wider than high.

    PEFT lists the rows of A' by (rank, base) and the columns of B by (base, rank), so that ranks of different bases
    meet; what it trains and merges is that product, and so it is here.
    """
    if "randlora_A" not in tensors:
        raise AdapterError("the RandLoRA adapter stores no bases; open it with surgery.load, or give its base model")
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


def regenerated_bases(config: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """Draw the bases of an adapter that does not store them, by PEFT's own code, at the shapes of its layers.

    PEFT draws in bfloat16 where the machine has it, and in float16 elsewhere.

    Raises:
        AdapterError: the configuration lacks the rank or the seed.
    """
    from peft import RandLoraConfig
    from peft.tuners.randlora.model import RandLoraModel

    if not config.get("r") or config.get("projection_prng_key") is None:
        raise AdapterError("adapter_config.json lacks r or projection_prng_key, from which the bases are drawn")
    known = {field.name for field in dataclasses.fields(RandLoraConfig)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that bases which are not stored depend on the machine: the note says it
        settings = RandLoraConfig(**{key: value for key, value in config.items() if key in known})
    shapes = [(site.out_features, site.in_features) for site in sites]
    stub: Any = types.SimpleNamespace(_find_dim=lambda _: tuple(max(sizes) for sizes in zip(*shapes, strict=True)))
    for name in ("_init_randlora_A_randlora_B", "_init_randlora_A_randlora_B_sparse"):
        setattr(stub, name, getattr(RandLoraModel, name).__get__(stub))
    RandLoraModel._pre_injection_hook(stub, None, settings, "default")
    return {"randlora_A": stub.randlora_A["default"], "randlora_B": stub.randlora_B["default"]}


RANDLORA = TensorType(
    "RANDLORA",
    "RandLoRA",
    layouts=(VECTORS | BASES, VECTORS),
    formula=_randlora,
    paper="arXiv 2502.00987",
    change="s sum_n B_n diag(lambda_n) A diag(gamma_n)",
    prefix="randlora_",
    starts_idle=True,
    dimensions=dict.fromkeys(BASES, 3),
    base_needs=Needs.SHAPE,
    shared=BASES,
    regenerated=regenerated_bases,
    rules={"randlora_alpha": A_NUMBER, "projection_prng_key": A_SEED, "save_projection": A_SWITCH},
)
