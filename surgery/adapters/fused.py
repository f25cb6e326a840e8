"""A LoRA on tensors that transformers joins or splits while it loads a checkpoint.

Such a rule moves numbers and computes nothing, so that the change `s B A` of one tensor of the checkpoint is a change
of low rank of the model's parameters too: its rows, or its columns, are rows and columns there. Parts of one matrix
(q, k and v; gate and up) become one LoRA of the sum of their ranks; a part that is split keeps its A, and each piece
has its rows of B; experts become PEFT's LoRA on a parameter of three dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.renaming import adapted_modules
from surgery.adapters.types.lora import (
    A_NAME,
    B_NAME,
    BIAS_NAME,
    EMBEDDING_NAMES,
    factor_names,
    lora_tensors,
    scaling_of,
)
from surgery.errors import AdapterError
from surgery.models.module_names import FusedPart, ModelNames

__all__ = ["as_lora", "fused_parts", "with_fused"]

WEIGHT = ".weight"


@dataclass
class _Target:
    """The changes of one parameter: by expert (0 for a matrix), `(B, A, s)` whose products `s B A` add up to it."""

    shape: torch.Size
    changes: dict[int, list[tuple[torch.Tensor, torch.Tensor, float]]] = field(default_factory=dict)

    def add(self, expert: int, B: torch.Tensor, A: torch.Tensor, scale: float) -> None:
        """Add one product."""
        self.changes.setdefault(expert, []).append((B, A, scale))

    @property
    def scale(self) -> float:
        """The scale that all products have; 1 where they differ, so that B takes it in."""
        scales = {scale for products in self.changes.values() for *_, scale in products}
        return scales.pop() if len(scales) == 1 else 1.0

    def factors(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """B `(out, sum of ranks)` and A `(sum of ranks, in)`, without the scale."""
        scale = self.scale
        products = self.changes[expert]
        left = [B if own == scale else B.float() * own for B, _, own in products]
        return torch.cat(left, 1), torch.cat([A for _, A, _ in products], 0)

    @property
    def rank(self) -> int:
        """The largest sum of ranks."""
        return max(sum(int(A.shape[0]) for _, A, _ in products) for products in self.changes.values())


def fused_parts(names: ModelNames, modules: Iterable[str]) -> dict[str, FusedPart]:
    """The modules that are no modules of the model, but tensors which transformers joins or splits while loading."""
    lost = [module for module in modules if module and names.located(module, names.modules) is None]
    found = {module: names.fused_part(f"{module}{WEIGHT}") for module in lost}
    return {module: part for module, part in found.items() if part is not None}


def as_lora(adapter: Adapter) -> Adapter:
    """An adapter of another type whose changes have thin factors, as a LoRA, exact but for rounding to float32.

    Raises:
        AdapterError: a change has no thin factors without its base weight.
    """
    adapted = adapted_modules(adapter)
    tensors = {}
    ranks = {}
    for module in adapted:
        factors = adapter.delta(module).factors()
        if factors is None:
            raise AdapterError(f"{module}: the change of a {adapter.peft_type} adapter has full rank")
        B, A = (factor.detach().float().contiguous() for factor in factors)
        stored = lora_tensors(adapter.form(module), A, B)
        tensors.update({f"{MODEL_PREFIX}{module}.{short}": tensor for short, tensor in stored.items()})
        ranks[module] = int(A.shape[0])
    mine = {f"{MODEL_PREFIX}{module}.{short}" for module in adapted for short in adapter.layer(module)}
    saved = {name: tensor for name, tensor in adapter.tensors.items() if name.startswith(MODEL_PREFIX)}
    rest = {name: tensor for name, tensor in saved.items() if name not in mine}
    common = ("base_model_name_or_path", "bias", "modules_to_save", "revision", "task_type", "inference_mode")
    config = {key: adapter.config.get(key) for key in common} | {"bias": adapter.config.get("bias") or "none"}
    config |= {"peft_type": "LORA", "r": max(ranks.values()), "lora_alpha": max(ranks.values())}
    config |= {"rank_pattern": ranks, "alpha_pattern": dict(ranks), "target_modules": sorted(ranks)}
    return adapter.like(config, {**rest, **tensors})


def with_fused(adapter: Adapter, names: ModelNames, parts: Mapping[str, FusedPart], experts: bool = True) -> Adapter:
    """A LoRA whose changes of joined or split tensors are changes of the model's own parameters.

    Args:
        adapter: a LoRA.
        names: the names of the model.
        parts: the modules that are tensors which transformers joins or splits, from `fused_parts`.
        experts: bring in experts too, as PEFT's LoRA on parameters of three dimensions; otherwise they stay.

    Raises:
        AdapterError: a rule cannot be followed, or the shapes are not those of the model.
    """
    targets: dict[str, _Target] = {}
    done = set()
    for module, part in parts.items():
        if experts or all(names.parameters[target].ndim == 2 for target in part.targets()):
            _add(adapter, names, module, part, targets)
            done.add(module)
    if not targets:
        return adapter
    taken = {f"{MODEL_PREFIX}{module}.{short}" for module in done for short in adapter.layer(module)}
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if name not in taken}
    others = [module for name in (A_NAME, EMBEDDING_NAMES[0]) for module in adapter.holders(name)]
    config = _plain_config(adapter, [module for module in others if module not in done])
    for target, change in sorted(targets.items()):
        _write(target, change, targets, names, tensors, config)
    return adapter.like(config, tensors)


def _add(adapter: Adapter, names: ModelNames, module: str, part: FusedPart, targets: dict[str, _Target]) -> None:
    """Add the change of one tensor of the checkpoint to those of the parameters that it goes into."""
    tensors = adapter.layer(module)
    A, B = tensors[A_NAME], tensors[B_NAME]
    if BIAS_NAME in tensors:
        raise AdapterError(
            f"{adapter.label}: {module} has a bias of lora_B, and transformers joins it into {part.target}, where PEFT "
            "has no place for one; add the adapter to its base with surgery merge"
        )
    scale = scaling_of(adapter.config, module, int(A.shape[0]))
    origins = names.origins(part)
    origin = next((index for key, index in origins.items() if names.same_key(key, part.key)), None)
    if origin is None:
        raise AdapterError(
            f"{adapter.label}: changes {module}, which transformers makes a part of {part.target} by a rule that "
            "cannot be followed here; add the adapter to its base with surgery merge"
        )
    if tuple(origin.shape) != (B.shape[0], A.shape[1]):
        raise AdapterError(
            f"{adapter.label}: changes {module} as a weight of {B.shape[0]} x {A.shape[1]}, the model has "
            f"{' x '.join(map(str, origin.shape))} there: it is for another base model"
        )
    start = 0
    for target in part.targets():
        shape = names.parameters[target].shape
        local = origin - start
        start += shape.numel()
        inside = (local >= 0) & (local < shape.numel())
        rows, columns = inside.any(1), inside.any(0)
        if bool(inside.any()):
            kept = local[rows][:, columns]
            change = targets.setdefault(target, _Target(shape))
            if not _place(change, kept, B[rows], A[:, columns], scale):
                raise AdapterError(
                    f"{adapter.label}: changes {module}, whose rows and columns are mixed in {target}; add the adapter "
                    "to its base with surgery merge"
                )


def _place(change: _Target, index: torch.Tensor, B: torch.Tensor, A: torch.Tensor, scale: float) -> bool:
    """Bring `B A` to its rows and columns in a parameter; False where it is not a block of rows and columns there."""
    height, width = change.shape[-2:]
    expert, within = index // (height * width), index % (height * width)
    rows, columns = within // width, within % width
    first = int(expert[0, 0])
    if not bool((expert == first).all()):
        return False
    if torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns)):
        left, right, down, across = B, A, rows[:, 0], columns[0]
    elif torch.equal(rows, rows[:1].expand_as(rows)) and torch.equal(columns, columns[:, :1].expand_as(columns)):
        left, right, down, across = A.T, B.T, rows[0], columns[:, 0]
    else:
        return False
    whole_B, whole_A = left.new_zeros(height, left.shape[1]), right.new_zeros(right.shape[0], width)
    whole_B[down] = left
    whole_A[:, across] = right
    change.add(first, whole_B, whole_A, scale)
    return True


def _write(
    target: str,
    change: _Target,
    targets: Mapping[str, _Target],
    names: ModelNames,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
) -> None:
    """Add the tensors and settings of one changed parameter to a LoRA."""
    of_experts = len(change.shape) == 3
    place = target if of_experts else target.removesuffix(WEIGHT)
    config["rank_pattern"][place], config["alpha_pattern"][place] = change.rank, _whole(change.scale * change.rank)
    config["target_parameters" if of_experts else "target_modules"].append(place)
    B, A = _of_experts(target, change, names) if of_experts else change.factors(0)
    name = f"{MODEL_PREFIX}{_wrapper(target, targets, names) if of_experts else place}"
    tensors[f"{name}.{B_NAME}"], tensors[f"{name}.{A_NAME}"] = B, A


def _of_experts(target: str, change: _Target, names: ModelNames) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's B `(out, r E)`, expert fastest, and A `(E r, in)` of a parameter `(E, out, in)` or `(E, in, out)`."""
    count, height, width = change.shape
    factors = {expert: change.factors(expert) for expert in change.changes}
    some = next(iter(factors.values()))[0]
    left, right = some.new_zeros(count, height, change.rank), some.new_zeros(count, change.rank, width)
    for expert, (B, A) in factors.items():
        left[expert, :, : B.shape[1]], right[expert, : A.shape[0]] = B, A
    if bool(getattr(names.modules[target.rpartition(".")[0]], "is_transposed", False)):
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    return left.permute(1, 2, 0).flatten(1).contiguous(), right.flatten(0, 1).contiguous()


def _wrapper(target: str, targets: Mapping[str, _Target], names: ModelNames) -> str:
    """The name under which PEFT keeps a parameter's factors: wrappers lie around each other, the last one outermost."""
    module, _, parameter = target.rpartition(".")
    order = [name for name, _ in names.modules[module].named_parameters(recurse=False) if f"{module}.{name}" in targets]
    return module + ".base_layer" * (len(order) - 1 - order.index(parameter))


def _plain_config(adapter: Adapter, kept: list[str]) -> dict[str, Any]:
    """The configuration with the layers' own ranks and scales spelled out, ready for more targets."""
    config = dict(adapter.config)
    ranks = {module: _rank_of(adapter, module) for module in kept}
    scales = {module: scaling_of(config, module, rank) for module, rank in ranks.items()}
    config.update(dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")))
    config.update({"use_rslora": False, "target_modules": list(kept), "lora_dropout": 0.0})
    config["target_parameters"] = list(config.get("target_parameters") or [])
    config["rank_pattern"] = ranks
    config["alpha_pattern"] = {module: _whole(scales[module] * rank) for module, rank in ranks.items()}
    return config


def _rank_of(adapter: Adapter, module: str) -> int:
    A_name, _ = factor_names(adapter.form(module))
    return int(adapter.layer(module)[A_name].shape[0])


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
