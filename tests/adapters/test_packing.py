"""Packed files: every damage is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import AdapterError
from tests.helpers.conversions import WEIGHTS


def test_damaged_packed_files_are_refused(lora: Path, tmp_path: Path) -> None:
    surgery.convert(lora, "giva", tmp_path / "floats", bits=16, ratio=2)
    surgery.convert(lora, "giva", tmp_path / "codes", ratio=20)
    for folder, name, change in (
        ("floats", "base_model.giva_factors", lambda t: t[:-1]),
        ("floats", "base_model.giva_factors", lambda t: t.view(torch.int16)),
        ("floats", "base_model.giva_s", lambda t: t[1:]),
        ("codes", "base_model.giva_codes", lambda t: t[:-2]),
        ("codes", "base_model.giva_codes", lambda t: t[:5]),
        ("codes", "base_model.giva_codes", lambda t: t.view(torch.int8)),
        ("codes", "base_model.giva_codes", lambda t: torch.cat([t[:100], 255 - t[100:]])),
    ):
        path = tmp_path / folder / WEIGHTS
        tensors = load_file(path)
        save_file({**tensors, name: change(tensors[name]).clone()}, path, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match="giva_"):
            surgery.Adapter.open(tmp_path / folder)
        save_file({k: v for k, v in tensors.items() if k != name}, path, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match=rf"lacks {name}"):
            surgery.Adapter.open(tmp_path / folder)
        save_file(tensors, path, metadata={"format": "pt"})
