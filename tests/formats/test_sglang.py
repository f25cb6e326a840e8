"""SGLang: its rule, what it stacks, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import AdapterError
from surgery.formats.sglang import SGLANG
from tests.helpers.adapters import make_adapter, weight_changes
from tests.helpers.servers import lora


def test_sglangs_rule_refuses_what_sglang_asserts(llama: Path, tmp_path: Path) -> None:
    mixed = make_adapter(llama, tmp_path / "mixed", lora(["o_proj", "down_proj"], rank_pattern={"o_proj": 2}))
    with pytest.raises(AdapterError, match="o_proj has rank 2, SGLang asserts r, 4"):
        list(SGLANG.changes(mixed))
    lone = make_adapter(llama, tmp_path / "lone", lora(["q_proj"]))
    with pytest.raises(AdapterError, match=r"SGLang stacks .*q_proj with .*v_proj"):
        list(SGLANG.changes(lone))


def test_zeros_stand_for_what_sglang_stacks(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "lora", lora(["q_proj", "up_proj"]))
    with pytest.raises(AdapterError, match=r"is adapted without .*v_proj, which SGLang reads with it; give the model"):
        surgery.export(folder, "sglang", tmp_path / "out")
    report = surgery.export(folder, "sglang", tmp_path / "out", base=llama)
    found, want = dict(SGLANG.changes(tmp_path / "out")), weight_changes(llama, folder)
    added = {name for name in found if name not in want}
    assert {name.rpartition(".")[2] for name in added} == {"v_proj", "gate_proj"} and len(added) == 6
    assert found["model.layers.0.self_attn.v_proj"].shape == (16, 32)
    assert not any(bool(found[name].any()) for name in added)
    assert all(torch.allclose(found[name].double(), want[name], atol=1e-6) for name in want)
    assert any("6 layers are zeros" in note for note in report.notes)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert added <= set(config["target_modules"])
