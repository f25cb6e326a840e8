"""Batches of LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.helpers.conversions import WEIGHTS, trained
from tests.helpers.models import load_base


@pytest.fixture
def loras(llama: Path, tmp_path: Path) -> Path:
    """A folder of three small LoRAs."""
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trained(load_base(llama), config, tmp_path / "loras" / name, seed)
    return tmp_path / "loras"


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:100])
