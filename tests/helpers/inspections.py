"""The LoRA that is inspected."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest

from tests.helpers.merges import trained
from tests.helpers.models import load_base


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Path:
    config = peft.LoraConfig(r=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return trained(load_base(llama), config, tmp_path / "lora")
