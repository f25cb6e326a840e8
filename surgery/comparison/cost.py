"""What an adapter costs once it is loaded: time of a forward pass and memory, as PEFT runs it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from surgery.adapters.adapter import Adapter
from surgery.comparison.report import Cost
from surgery.peft_types.loading import load

__all__ = ["bytes_of", "forward_seconds", "loaded_cost"]

# Runs of which the median is taken: as many as fit into so many seconds, within these limits.
SECONDS, FEWEST, MOST = 2.0, 5, 25
Inputs = Mapping[str, Any]


def loaded_cost(model: Any, adapter: Adapter | None, inputs: Sequence[tuple[Inputs, int]]) -> Cost:
    """Time and memory of a model under one adapter, or under none.

    The adapter is taken off again. What it saves whole stays in the model in place of the model's own.

    Args:
        model: the base model, loaded, in evaluation mode.
        adapter: opened with `surgery.load`; None measures the base.
        inputs: a batch of one and a larger one: the model's arguments, and how many tokens (or samples) they are.
    """
    before = bytes_of(model)
    loaded = load(adapter, model).eval() if adapter is not None else model
    try:
        one, batch = (forward_seconds(loaded, features) / count for features, count in inputs)
        size = bytes_of(loaded)
    finally:
        if adapter is not None:
            loaded.unload()
    return Cost(one, batch, size - before if adapter is not None else size)


def forward_seconds(model: nn.Module, inputs: Inputs) -> float:
    """Median time of a forward pass, after one that does not count."""
    taken: list[float] = []
    with torch.no_grad():
        _timed(model, inputs)
        while len(taken) < FEWEST or (len(taken) < MOST and sum(taken) < SECONDS):
            taken.append(_timed(model, inputs))
    return statistics.median(taken)


def _timed(model: nn.Module, inputs: Inputs) -> float:
    device = next(model.parameters()).device
    started = time.perf_counter()
    model(**inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def bytes_of(model: nn.Module) -> int:
    """Memory of parameters and buffers, each counted once under however many names it is held."""
    seen = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
        if tensor.numel()
    }
    return sum(seen.values())
