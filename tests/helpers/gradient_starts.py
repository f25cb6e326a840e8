"""Bases for starts that read gradients."""

from __future__ import annotations

from typing import Any

import torch

import surgery
from tests.helpers.models import labelled_inputs

RANK = 4


def bases(model: Any, kind: str = "llama", **options: Any) -> dict[str, torch.Tensor]:
    """A of every layer."""
    options = {"data": [labelled_inputs(kind)], "rank": RANK, **options}
    adapter, _ = surgery.init(model, "giva", **options)
    return {module: tensors["giva_A"] for module, tensors in adapter.modules.items() if "giva_A" in tensors}
