"""LoRAs for conversions to VeRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from tests.helpers.conversions import WEIGHTS, trained
from tests.helpers.models import load_base, save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

MODEL = "base_model.model."


@pytest.fixture
def vera_lora(llama: Path, tmp_path: Path) -> Path:
    """A LoRA on all linears of the tiny grouped-query Llama."""
    config = LoraConfig(r=6, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    return trained(load_base(llama), config, tmp_path / "source")


@pytest.fixture
def calibration(tmp_path: Path) -> dict[str, Any]:
    """The tiny Llama with a tokenizer, and texts."""
    base = save_tokenizer(save_model("llama", tmp_path / "text-llama"))
    return {"base": base, "data": write_rows(tmp_path / "texts.jsonl", text_rows(96)), "samples": 48}


def modules_of(folder: Path) -> list[str]:
    names = load_file(folder / WEIGHTS)
    return [name[len(MODEL) : -len(".lora_A.weight")] for name in names if name.endswith(".lora_A.weight")]
