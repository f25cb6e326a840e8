"""Any adapter to a stock LoRA: exact where thin factors exist, of a rank as low as is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.source import Change, Source
from surgery.adapters.types.lora import BIAS_NAME, lora_tensors
from surgery.converters.ranks import Spectra, changes_of, decomposed
from surgery.converters.request import Request, Result
from surgery.errors import AdapterError
from surgery.models.sites import CONVOLUTION, EXPERT, LINEAR, PARAMETER
from surgery.system.text import human_bytes

__all__ = ["to_lora"]

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> B (out, r), A (r, in)

FP8 = torch.float8_e4m3fn
# The largest entry that is left in float8: 448 is the largest number, and rounding up must not pass it.
FP8_LARGEST = 416.0


def to_lora(source: Source, request: Request) -> Result:
    """Make a stock LoRA: `dW = s B A`, with one rank for all layers and `s` 1 (in float8 a power of two).

    Every reader finds the same dW in such a file, whichever of rank, alpha and their patterns it looks at. Under a
    budget in bytes every layer uses the whole common rank; otherwise the highest rank that a layer needs is the
    common one, and the other layers are filled up with zeros. With `per_layer_ranks` each layer has its own rank, and
    patterns say which. Layers that keep nothing leave the target list.

    Without a budget nothing is cut: of a type with thin factors the result is exact but for rounding to the dtype.

    Raises:
        MethodError: the budget is below what must be carried along, or keeps no layer.
    """
    dtype, alike = request.dtype or torch.float32, not request.options.get("per_layer_ranks", False)
    changes = changes_of(source, request)
    svds = {change.module: decomposed(change, request) for change in changes}
    spectra = Spectra(
        {module: svd.S for module, svd in svds.items()},
        {change.module: sum(change.shape) * dtype.itemsize for change in changes},
        one_rank=alike,
    )
    ranks = spectra.ranks(request, lambda ranks: request.file_size(_planned(changes, ranks, dtype, alike)))
    factors: Factors = {}
    for change in changes:
        rank = ranks[change.module]
        if rank:
            # What is not cut stays as it was.
            whole = rank == len(svds[change.module].S) and rank == change.rank
            B, A = (change.B, change.A) if whole else svds[change.module].cut(change.B, change.A, rank)
            factors[change.module] = balanced(B, A) if dtype != torch.float32 else (B, A)
    biases = source.biases()
    if biases:
        _with_all_layers(factors, changes)
    _with_all_experts(factors, changes)
    kept = {module: ranks[module] for module in factors}
    scale = _fp8_scale(factors) if dtype == FP8 else 1.0
    highest = max(kept.values())
    stored = dict.fromkeys(kept, highest) if alike else _ranks_stored(kept, changes)
    tensors = {}
    forms = {change.module: change.form for change in changes}
    for module, (B, A) in factors.items():
        missing = stored[module] - kept[module]
        wider_B = (torch.nn.functional.pad(B, (0, missing)) / scale).to(dtype)
        wider_A = (torch.nn.functional.pad(A, (0, 0, 0, missing)) / scale).to(dtype)
        named = lora_tensors(forms[module], wider_A, wider_B)
        tensors.update({f"{MODEL_PREFIX}{module}.{short}": tensor for short, tensor in named.items()})
    config = _config(stored, scale**2)
    config |= _targets({change.module: change for change in changes if change.module in kept}, config)
    if biases:
        config["lora_bias"] = True
        for change in changes:
            bias = biases.get(change.module, torch.zeros(change.shape[0])) / scale**2
            tensors[f"{MODEL_PREFIX}{change.module}.{BIAS_NAME}"] = bias.to(torch.float32 if dtype == FP8 else dtype)
    trainable = sum(tensor.numel() for tensor in tensors.values())
    shapes = {change.module: change.shape for change in changes}
    padding = sum((stored[m] - kept[m]) * sum(shapes[m]) for m in kept) * dtype.itemsize
    notes = _notes(dtype, kept, padding, alike)
    return Result(config, tensors, kept, trainable, notes=notes, padding=padding)


def _parameter(change: Change) -> str | None:
    """The parameter of which a change is one expert, or which it changes; None for a layer."""
    if change.form.kind == EXPERT:
        return change.module.rpartition(".")[0]
    if change.form.kind == PARAMETER:
        known = change.site is None or change.site.module == change.site.parameter
        return change.module if known else f"{change.module}.weight"
    return None


def _with_all_experts(factors: Factors, changes: list[Change]) -> None:
    """Add the experts that keep nothing beside those that do, with factors of no rank: PEFT has them in one tensor."""
    kept = {_parameter(change) for change in changes if change.module in factors and change.form.kind == EXPERT}
    for change in changes:
        if change.form.kind == EXPERT and _parameter(change) in kept:
            height, width = change.shape
            factors.setdefault(change.module, (torch.zeros(height, 0), torch.zeros(0, width)))


def _ranks_stored(kept: Mapping[str, int], changes: list[Change]) -> dict[str, int]:
    """The rank of each layer in the file, where ranks differ: all experts of a parameter have the highest of theirs."""
    groups = {change.module: _parameter(change) or change.module for change in changes}
    highest: dict[str, int] = {}
    for module, rank in kept.items():
        highest[groups[module]] = max(highest.get(groups[module], 1), rank)
    return {module: highest[groups[module]] for module in kept}


def _targets(changes: Mapping[str, Change], config: Mapping[str, Any]) -> dict[str, Any]:
    """The targets of a LoRA on parameters, with patterns by the parameters' names; empty for one on modules alone."""
    named = {module: _parameter(change) for module, change in changes.items()}
    if not any(named.values()):
        return {}
    found: dict[str, Any] = {"target_parameters": sorted({name for name in named.values() if name is not None})}
    found["target_modules"] = sorted(module for module, name in named.items() if name is None)
    for key in ("rank_pattern", "alpha_pattern"):
        found[key] = {named.get(module) or module: value for module, value in config[key].items()}
    return found


def _with_all_layers(factors: Factors, changes: list[Change]) -> None:
    """Add the layers that keep nothing, with factors of no rank: PEFT wants a bias in every layer, or in none.

    Raises:
        AdapterError: a layer is one that PEFT gives no bias.
    """
    for change in changes:
        if change.form.kind not in {LINEAR, CONVOLUTION}:
            raise AdapterError(f"{change.module}: a LoRA with biases (lora_bias) has none on a layer of the kind "
                               f"{change.form}; leave that layer out")  # fmt: skip
        height, width = change.shape
        factors.setdefault(change.module, (torch.zeros(height, 0), torch.zeros(0, width)))


def balanced(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with the largest entries of each rank equal in both factors, so that narrow dtypes fit both."""
    if not B.shape[1]:
        return B, A
    in_B, in_A = B.abs().amax(0), A.abs().amax(1)
    ratio = torch.where((in_B > 0) & (in_A > 0), (in_A / in_B.clamp_min(1e-30)).sqrt(), torch.ones_like(in_B))
    return B * ratio, A / ratio[:, None]


def _planned(
    changes: list[Change], ranks: Mapping[str, int], dtype: torch.dtype, alike: bool
) -> dict[str, torch.Tensor]:
    """The tensors of the file, on the meta device; `alike`: all layers have the highest of the ranks."""
    planned, highest = {}, max(ranks.values())
    for change in changes:
        rank = highest if alike and ranks[change.module] else ranks[change.module]
        if rank:
            out_features, in_features = change.shape
            B = torch.empty(out_features, rank, dtype=dtype, device="meta")
            A = torch.empty(rank, in_features, dtype=dtype, device="meta")
            stored = lora_tensors(change.form, A, B)
            planned.update({f"{MODEL_PREFIX}{change.module}.{short}": tensor for short, tensor in stored.items()})
    return planned


def _fp8_scale(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The power of two that brings the largest entry just below float8's largest number."""
    largest = max(float(factor.abs().max()) for pair in factors.values() for factor in pair if factor.numel())
    return 2.0 ** math.ceil(math.log2(largest / FP8_LARGEST)) if largest > 0 else 1.0


def _config(ranks: Mapping[str, int], scale: float) -> dict[str, Any]:
    """The keys of a LoRA's configuration.

    Where ranks differ, `alpha_pattern` follows `rank_pattern`, so that PEFT's scale is the same in every layer; it
    also is `lora_alpha / r`, which is all that some servers look at.
    """
    r = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _number(r * scale),
        "rank_pattern": others,
        "alpha_pattern": {module: _number(rank * scale) for module, rank in others.items()},
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _notes(dtype: torch.dtype, ranks: Mapping[str, int], padding: int, alike: bool) -> list[str]:
    notes = []
    if dtype == FP8:
        notes.append(
            "float8 factors load in PEFT, which widens them to float32; servers that do not know float8_e4m3fn want "
            "--dtype bfloat16"
        )
    most = max(ranks.values())
    if alike and padding:
        notes.append(
            f"one rank, {most}, in all layers, so that every server reads the same: {human_bytes(padding)} of it are "
            "zeros; --per-layer-ranks leaves them out (before 0.2.0 --to lora did)"
        )
    elif not alike and len(set(ranks.values())) > 1:
        notes.append(
            f"ranks differ by layer, which PEFT and vLLM read right (max rank {most}); llama.cpp, SGLang and MLX do not"
        )
    return notes
