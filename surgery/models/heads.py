"""Modules that train beside an adapter and are saved with it: a task's head, and what the checkpoint lacks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from surgery.errors import CheckpointError
from surgery.models.base_model import BaseModel

__all__ = ["carried_modules", "carried_tensors", "missing_modules"]

# How the names of transformers' heads end. PEFT trains and saves modules whose names end so by itself for its
# sequence, token and question-answering task types, and fails on a file without them.
HEAD_NAMES = ("classifier", "score", "qa_outputs")
HEAD_TASKS = {"seq-cls", "token-cls", "question-answering", "image-cls"}


def carried_modules(base: BaseModel) -> list[str]:
    """Modules to save with an adapter: the head of a task that has one, and all that the checkpoint lacks for it.

    transformers draws what a checkpoint lacks anew at every load; an adapter trained on one draw would find another.
    """
    if base.task is None or base.task.name not in HEAD_TASKS:
        return []
    heads = [name for name, _ in base.model.named_children() if name.endswith(HEAD_NAMES)]
    inside = tuple(f"{name}." for name in heads)
    return heads + [name for name in missing_modules(base) if name not in heads and not name.startswith(inside)]


def missing_modules(base: BaseModel) -> list[str]:
    """Modules of the model that have a parameter which the checkpoint does not hold."""
    names = [name for name, _ in base.model.named_parameters() if name not in base.sources]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def carried_tensors(base: BaseModel, seed: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Values of the carried modules: the checkpoint's, or a fresh, seeded start for those that it lacks.

    Returns:
        The tensors by parameter name, and the names of the modules that are fresh.
    """
    tensors: dict[str, torch.Tensor] = {}
    fresh: list[str] = []
    for name in carried_modules(base):
        module = base.model.get_submodule(name)
        names = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        if all(_is_stored(base, parameter) for parameter in names):
            # Copied: what was read is a view of the checkpoint's file.
            tensors.update({parameter: base.parameter(parameter, check=True).clone() for parameter in names})
        else:
            started = _fresh(base.model, module, seed)
            tensors.update({f"{name}.{parameter}": value for parameter, value in started.items()})
            fresh.append(name)
    return tensors, fresh


def _is_stored(base: BaseModel, parameter: str) -> bool:
    """Return whether the checkpoint holds a parameter; a head of other classes than those asked for does not count."""
    if parameter not in base.sources:
        return False
    if base.labels is None:
        return True
    try:
        base.parameter(parameter)
    except CheckpointError:
        return False
    return True


def _fresh(model: Any, module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Start a module as transformers would, from a seed, leaving the global random state alone."""
    fresh = copy.deepcopy(module).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in fresh.modules():
            model._init_weights(part)
    return {name: parameter.detach().clone() for name, parameter in fresh.named_parameters()}
