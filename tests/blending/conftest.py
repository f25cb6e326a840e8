"""Adapters that the tests of blends share, and dense sums of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import AdaLoraConfig, IA3Config, LoraConfig

from tests.helpers.adapters import make_adapter

ALL = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="package")
def members(model_folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of one tiny Llama, by name."""
    base, folder = model_folder("llama"), tmp_path_factory.mktemp("members")
    configs = {
        "lora": LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
        "rslora": LoraConfig(r=3, use_rslora=True, target_modules=["q_proj"], rank_pattern={"layers.1.": 5}),
        "adalora": AdaLoraConfig(init_r=3, total_step=10, target_modules=ALL),
        "dora": LoraConfig(r=2, use_dora=True, target_modules=["v_proj"]),
        "ia3": IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    }
    return {
        name: make_adapter(base, folder / name, config, seed=number)
        for number, (name, config) in enumerate(configs.items())
    }
