"""The picture on a card."""

from __future__ import annotations

import shutil
from pathlib import Path

import surgery
from tests.helpers.cards import BASE, REPO
from tests.helpers.hub import make_adapter


def test_the_picture_is_of_the_numbers(llama: Path, tmp_path: Path) -> None:
    """Other numbers, another picture."""
    lora = make_adapter("lora", llama, tmp_path / "lora")
    other = shutil.copytree(lora, tmp_path / "other")
    opened = surgery.Adapter.open(other)
    name = next(name for name in opened.tensors if "layers.0.self_attn.v_proj.lora_B" in name)
    opened.tensors[name] *= 3
    opened.save(other, force=True)
    sizes = [
        [file for file in surgery.push(folder, REPO, base_model=BASE, dry_run=True).files if file.path == "layers.png"]
        for folder in (lora, other)
    ]
    assert sizes[0] != sizes[1]
