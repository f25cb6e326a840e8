"""A LoRA on parameters (PEFT's `target_parameters`): the experts of a fused parameter, each as a layer of its own.

PEFT keeps the factors of all experts of a parameter in one A `(E r, in)`, expert after expert, and one B `(out, r E)`,
expert fastest, under the name of the module that holds the parameter, with `base_layer` for each further parameter of
that module. In memory an expert is a layer `MODULE.PARAMETER.INDEX` with A `(r, in)` and B `(out, r)`, as in any
other LoRA. PEFT 0.18 took in and out the other way round; older files of Unsloth have B as `(out, E, r)`. Neither shows
in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.types.lora import A_NAME, B_NAME, FUSED_EXPERTS, expert_of, parameter_key
from surgery.adapters.types.patterns import pattern_value
from surgery.adapters.types.registry import type_of
from surgery.errors import AdapterError, OptionError, listing
from surgery.system.tensors import MutableTensors, TensorMap, Tensors

__all__ = ["LAYOUTS", "experts_apart", "experts_joined"]

# Orders of the numbers of B: the options of `layout`, and what the note calls each.
LAYOUTS = {"peft": "PEFT's, experts fastest in B", "unsloth": "that of older Unsloth, experts slowest in B"}
WRAPPED = ".base_layer"
# Parameters in the order in which modules of experts have them.
ORDER = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "in_proj", "down_proj", "w2", "out_proj")


def experts_apart(
    config: Mapping[str, Any], tensors: MutableTensors, label: str, layout: str | None = None
) -> tuple[MutableTensors, list[str]]:
    """Return a LoRA's tensors with each expert of a parameter as a layer, and notes on what was assumed.

    Args:
        config: `adapter_config.json`.
        tensors: by name in the file.
        label: the adapter's name in messages.
        layout: of B: a key of `LAYOUTS`; None assumes PEFT's and says so.

    Raises:
        AdapterError: tensors are missing, or not of the configuration's rank.
        OptionError: there is no such layout.
    """
    if layout is not None and layout not in LAYOUTS:
        raise OptionError(f"unknown layout {layout!r}: use {', '.join(LAYOUTS)}")
    targets = config.get("target_parameters")
    if not _of_parameters(config) or not isinstance(targets, list):
        return tensors, []
    rest, several = dict(tensors), False
    for module, levels in _wrappers(tensors).items():
        shorts = _parameters(module, targets)
        if not shorts or shorts == ["weight"]:
            continue
        if len(levels) != len(shorts) or levels != list(range(len(levels))):
            raise AdapterError(
                f"{label}: has {len(levels)} LoRAs on parameters of {module}, adapter_config.json names "
                f"{listing(shorts)} (target_parameters); save the adapter again"
            )
        for place, short in enumerate(shorts):
            name = f"{MODEL_PREFIX}{module}{WRAPPED * (len(shorts) - 1 - place)}"
            A, B = rest.pop(f"{name}.{A_NAME}"), rest.pop(f"{name}.{B_NAME}", None)
            if B is None:
                raise AdapterError(f"{label}: the file lacks {B_NAME} of {module}.{short}; save the adapter again")
            apart = _apart(config, f"{module}.{short}", A, B, layout or "peft")
            several = several or len(apart) > 2
            rest.update({f"{MODEL_PREFIX}{name}": tensor for name, tensor in apart.items()})
    if not several:
        return rest, []
    assumed = "" if layout is not None else " (assumed: the file does not say; another is chosen with layout)"
    return rest, [f"LoRA on fused experts: its numbers are in the order {LAYOUTS[layout or 'peft']}{assumed}"]


def _wrappers(tensors: Iterable[str]) -> dict[str, list[int]]:
    """Modules with a LoRA's A -> how many `base_layer` stand between, each."""
    found: dict[str, list[int]] = {}
    for name in tensors:
        if name.startswith(MODEL_PREFIX) and name.endswith(f".{A_NAME}"):
            stem = name.removeprefix(MODEL_PREFIX).removesuffix(f".{A_NAME}")
            module = stem
            while module.endswith(WRAPPED):
                module = module.removesuffix(WRAPPED)
            found.setdefault(module, []).append((len(stem) - len(module)) // len(WRAPPED))
    return {module: sorted(levels) for module, levels in found.items()}


def _parameters(module: str, targets: Sequence[str]) -> list[str]:
    """The parameters of a module that are targets, in the order in which PEFT wraps them."""
    found = []
    for target in targets:
        owner, _, short = str(target).rpartition(".")
        fits = module == owner or module.endswith(f".{owner}") if owner else module.endswith("experts")
        if fits and short not in found:
            found.append(short)
    return ordered(found)


def ordered(shorts: Sequence[str]) -> list[str]:
    """Parameters of one module in the order in which it has them, as far as their names are known."""
    return sorted(shorts, key=lambda short: ORDER.index(short) if short in ORDER else len(ORDER))


def _apart(config: Mapping[str, Any], parameter: str, A: torch.Tensor, B: torch.Tensor, layout: str) -> Tensors:
    """The factors of each expert, by the layer's name and the tensor's own."""
    rank = int(pattern_value(config, "rank_pattern", parameter, config.get("r", 8)))
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or rank < 1 or A.shape[0] % rank:
        raise AdapterError(
            f"{parameter}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not those of experts of rank {rank} "
            "(adapter_config.json: r, rank_pattern)"
        )
    count = A.shape[0] // rank
    if count == 1:
        return {f"{parameter}.{A_NAME}": A, f"{parameter}.{B_NAME}": B}
    by_expert = B.reshape(B.shape[0], rank, count).permute(2, 0, 1)
    if layout == "unsloth":
        by_expert = B.reshape(B.shape[0], count, rank).permute(1, 0, 2)
    found = {}
    for expert, (down, up) in enumerate(zip(A.reshape(count, rank, -1), by_expert, strict=True)):
        found[f"{parameter}.{expert}.{A_NAME}"] = down.contiguous()
        found[f"{parameter}.{expert}.{B_NAME}"] = up.contiguous()
    return found


def _of_parameters(config: Mapping[str, Any]) -> bool:
    """Whether an adapter is of a type that is read on fused experts, and names parameters."""
    kind = type_of(config) if config.get("target_parameters") else None
    return kind is not None and FUSED_EXPERTS in kind.layers


def experts_joined(config: Mapping[str, Any], tensors: TensorMap) -> TensorMap:
    """Return a LoRA's tensors as PEFT's file has them, for those with each expert as a layer.

    Raises:
        AdapterError: experts of a parameter are missing, or have other ranks.
    """
    if not _of_parameters(config):
        return tensors
    rest: Tensors = {}
    factors: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        stem = name.removeprefix(MODEL_PREFIX)
        short = next((short for short in (A_NAME, B_NAME) if stem.endswith(f".{short}")), None)
        module = stem.removesuffix(f".{short}")
        key = parameter_key(config, module) if short is not None else None
        if key is None or short is None:
            rest[name] = tensor
        else:
            index = expert_of(config, module)
            factors.setdefault(key, {}).setdefault(short, {})[0 if index is None else index[1]] = tensor
    owners: dict[str, list[str]] = {}
    for key in factors:
        owners.setdefault(key.rpartition(".")[0], []).append(key.rpartition(".")[2])
    for owner, shorts in owners.items():
        for place, short in enumerate(ordered(shorts)):
            name = f"{MODEL_PREFIX}{owner}{WRAPPED * (len(shorts) - 1 - place)}"
            A, B = _joined(f"{owner}.{short}", factors[f"{owner}.{short}"])
            rest[f"{name}.{A_NAME}"], rest[f"{name}.{B_NAME}"] = A, B
    return rest


def _joined(key: str, parts: Mapping[str, Mapping[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = parts.get(A_NAME, {}), parts.get(B_NAME, {})
    shapes = {tuple(tensor.shape) for tensor in A.values()}
    if sorted(A) != sorted(B) or sorted(A) != list(range(len(A))) or len(shapes) != 1:
        raise AdapterError(f"{key}: experts are missing, or of different ranks: PEFT has no place for that")
    order = range(len(A))
    joined = torch.stack([B[expert] for expert in order]).permute(1, 2, 0)  # (out, r, E)
    return torch.cat([A[expert] for expert in order]), joined.flatten(1).contiguous()
