"""IA3 needs its base."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from surgery.errors import AdapterError
from tests.helpers.peft_kinds import KINDS
from tests.helpers.stock_adapters import saved


def test_ia3_needs_its_base(llama: Path, tmp_path: Path) -> None:
    saved(llama, KINDS["ia3"][1](), tmp_path)
    with pytest.raises(AdapterError, match="IA3 adapter depends on its base model: give it with --base"):
        surgery.convert(tmp_path, "lora", rank=2)
    with pytest.raises(AdapterError, match="multiple of the base weight"):
        surgery.Adapter.open(tmp_path).delta("model.layers.0.self_attn.q_proj")
