"""RandLoRA: bases are found above the model."""

from __future__ import annotations

from pathlib import Path

import peft
import torch

import surgery
from surgery.adapters.contents import contents_of
from tests.helpers.models import edit_tensors
from tests.helpers.stock_adapters import FILE, check_all, saved


def test_randlora_bases_are_found_above_the_model(llama: Path, tmp_path: Path) -> None:
    """A file may hold them once for all layers, without the copies that PEFT stores with each."""
    saved(llama, peft.RandLoraConfig(r=4, randlora_alpha=7, target_modules=["q_proj"]), tmp_path)

    def keep_one(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("base_model.model.") and ".randlora_" in name]:
            if name.endswith(("_A", "_B")):
                del tensors[name]

    edit_tensors(tmp_path, keep_one, FILE)
    assert contents_of(surgery.Adapter.open(tmp_path)).shared == ["base_model.randlora_A", "base_model.randlora_B"]
    check_all(llama, tmp_path)
