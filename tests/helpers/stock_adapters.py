"""Adapters of stock PEFT types with a value in every tensor, saved by PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from peft import PeftModel, get_peft_model

from tests.helpers.models import load_base


def randomise(model: PeftModel) -> None:
    """Give every tensor of the adapter a value of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def saved(folder: Path, config: peft.PeftConfig, out: Path) -> PeftModel:
    """A PEFT adapter with values, saved by PEFT."""
    model = get_peft_model(load_base(folder), config)
    randomise(model)
    model.save_pretrained(out)
    return model
