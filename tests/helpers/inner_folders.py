"""A folder with one adapter inside."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from peft import get_peft_model

from tests.helpers.models import load_base, save_model
from tests.helpers.stock_adapters import randomise


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inner")
    base = save_model("llama", folder / "base")
    model = get_peft_model(load_base(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model)
    model.save_pretrained(folder / "lora")
    return base, folder / "lora"
