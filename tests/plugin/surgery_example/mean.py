"""A form in one file: a LoRA of rank 1 that keeps the mean of every row, `dW' = (dW 1 / in) 1^T`."""

from __future__ import annotations

import torch

from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.source import Source
from surgery.converters.forms import Form
from surgery.converters.request import Request, Result


def to_mean(source: Source, request: Request) -> Result:
    """Return the LoRA of the rows' means."""
    tensors, ranks = {}, {}
    for change in source.changes(energy=1.0, seed=request.seed):
        name = f"{MODEL_PREFIX}{change.module}"
        tensors[f"{name}.lora_B.weight"] = change.B @ change.A.mean(1, keepdim=True)
        tensors[f"{name}.lora_A.weight"] = torch.ones(1, change.shape[1])
        ranks[change.module] = 1
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    return Result(config, tensors, ranks, sum(tensor.numel() for tensor in tensors.values()))


FORM = Form("mean", "the mean of every row", "changes that are the same in every column", to_mean, budgets=())
