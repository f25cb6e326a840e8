"""`surgery.convert`: the frame of all conversions, and the roads to LoRA and to packed GiVA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import OutputError
from surgery.storage.safetensors_write import write_tensors
from tests.helpers.conversions import logits
from tests.helpers.models import relative_difference


def test_a_config_of_the_least_keys(lora: Path, llama: Path, tmp_path: Path) -> None:
    """What a configuration leaves out is PEFT's default, not null."""
    config = json.loads((lora / "adapter_config.json").read_text())
    least = {key: config[key] for key in ("peft_type", "task_type", "r", "lora_alpha", "target_modules")}
    (lora / "adapter_config.json").write_text(json.dumps(least))
    for to in ("lora", "giva", "vera"):
        surgery.convert(lora, to, tmp_path / to, energy=1.0)
        assert relative_difference(logits(llama, tmp_path / to), logits(llama, lora)) <= 1e-4


def test_several_adapters_in_one_call(lora: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(lora, second)
    found = surgery.convert([lora, second], "giva", tmp_path / "out", bits=16, ratio=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["second", "source"]
    assert [report.source for _, report in found] == ["source", "second"]


def test_a_corrupted_write_is_caught(lora: Path, tmp_path: Path, monkeypatch) -> None:
    from surgery.adapters import adapter as module

    def corrupting(path: Path, tensors: dict[str, torch.Tensor], metadata: Any) -> dict[str, str]:
        name = next(iter(tensors))
        digests = write_tensors(path, tensors, metadata)
        write_tensors(path, {**tensors, name: tensors[name] + 1}, metadata)
        return digests

    monkeypatch.setattr(module, "write_tensors", corrupting)
    with pytest.raises(OutputError, match="read back"):
        surgery.convert(lora, "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
