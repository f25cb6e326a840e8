"""Trained-looking adapters of any PEFT type on the tiny models, and what PEFT computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

from tests.helpers.models import load_base

__all__ = ["make_adapter", "peft_output", "weight_changes"]


def make_adapter(
    base: Path, folder: Path, config: Any, seed: int = 5, size: float = 0.1, dtype: torch.dtype = torch.float32
) -> Path:
    """Save an adapter whose trainable tensors are random, and return its folder."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(load_base(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
            elif parameter.requires_grad:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)
    return folder


def peft_output(base: Path, folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the base with an adapter, by PEFT."""
    model = peft.PeftModel.from_pretrained(load_base(base), folder).eval()
    with torch.no_grad():
        return model(**inputs).logits


def weight_changes(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """dW of every weight that merging with PEFT changes, `(out, in)`, float64, by the layer's name."""
    plain = load_base(base).state_dict()
    kind = str(peft.PeftConfig.from_pretrained(folder).peft_type.value)
    # PSOFT decomposes the base weight as it starts, and not in float64.
    dtype = torch.float32 if kind == "PSOFT" else torch.float64
    model = peft.PeftModel.from_pretrained(load_base(base).to(dtype), folder)
    merged = model.double().merge_and_unload().state_dict()
    changes = {name.removesuffix(".weight"): merged[name] - plain[name].double() for name in plain if name in merged}
    return {name: change for name, change in changes.items() if change.ndim == 2 and bool(change.any())}
