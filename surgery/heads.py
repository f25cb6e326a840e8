"""Task heads that train beside an adapter and are saved with it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from surgery.checkpoints.base_model import BaseModel

__all__ = ["head_modules", "head_tensors"]

# Names under which transformers keep a task's head. PEFT trains and saves the first two and the third by itself for
# its sequence, token and question-answering task types, and refuses an adapter file without them.
HEAD_NAMES = ("classifier", "score", "qa_outputs")
HEAD_TASKS = {"seq-cls", "token-cls", "question-answering", "image-cls"}


def head_modules(base: BaseModel) -> list[str]:
    """Names of the modules of the base model that are its task's head; empty for models without one."""
    if base.task is None or base.task.name not in HEAD_TASKS:
        return []
    return [name for name, _ in base.model.named_children() if name in HEAD_NAMES]


def head_tensors(base: BaseModel, seed: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The heads' values: the checkpoint's, or for a head that the checkpoint lacks a fresh, seeded start.

    Returns:
        The tensors by parameter name, and the names of the heads that are fresh.
    """
    tensors: dict[str, torch.Tensor] = {}
    fresh: list[str] = []
    for name in head_modules(base):
        module = getattr(base.model, name)
        names = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        if all(parameter in base.sources for parameter in names):
            tensors.update({parameter: base.parameter(parameter, check=True) for parameter in names})
        else:
            started = _fresh_head(base.model, module, seed)
            tensors.update({f"{name}.{parameter}": value for parameter, value in started.items()})
            fresh.append(name)
    return tensors, fresh


def _fresh_head(model: Any, module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Start a head as transformers would, from a seed, leaving the global random state alone."""
    head = copy.deepcopy(module).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in head.modules():
            model._init_weights(part)
    return {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
