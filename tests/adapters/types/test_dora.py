"""DoRA against stock PEFT: read, merged exactly, compared, and cut to a LoRA with its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import surgery
from surgery.errors import AdapterError
from tests.helpers.models import load_base, model_inputs, output
from tests.helpers.stock_adapters import saved

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 5}},
}
NAMES = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_layer_is_pefts(name: str, llama: Path, tmp_path: Path) -> None:
    model = saved(llama, peft.LoraConfig(r=3, use_dora=True, target_modules=NAMES, **SETTINGS[name]), tmp_path)
    adapter = surgery.Adapter.open(tmp_path)
    base, merged = load_base(llama), model.double().merge_and_unload()
    for module in dict.fromkeys(adapter.names.owners.values()):
        weight = base.get_submodule(module).weight.detach()
        delta = adapter.delta(module, weight)
        want = merged.get_submodule(module).weight.detach() - weight
        assert want.norm() > 0.1
        assert (delta.dense() - want).norm() <= 1e-5 * want.norm()
        x = torch.randn(5, weight.shape[1])
        assert torch.allclose(delta.apply(x), x @ want.float().T, atol=1e-4)
    with pytest.raises(AdapterError, match="norms of the base weight"):
        adapter.delta(module)


def test_merged_loaded_compared_and_cut(llama: Path, tmp_path: Path) -> None:
    model = saved(llama, peft.LoraConfig(r=3, use_dora=True, target_modules=NAMES), tmp_path / "dora").eval()
    inputs = model_inputs("llama")
    surgery.merge(tmp_path / "dora", llama, tmp_path / "merged")
    with torch.no_grad():
        bare, want = output(load_base(llama), inputs), output(model, inputs)
        merged = output(load_base(tmp_path / "merged"), inputs)
    assert (merged - want).norm() <= 1e-5 * (want - bare).norm()
    assert surgery.compare(tmp_path / "dora", tmp_path / "dora", base=llama).weight_error == 0
    with pytest.raises(AdapterError, match="full rank"):
        surgery.convert(tmp_path / "dora", "lora", base=llama)
    cut, report = surgery.convert(tmp_path / "dora", "lora", tmp_path / "lora", base=llama, rank=8)
    assert 0 < report.weight_error < 1 and cut.config["r"] == 8
    other = surgery.compare(tmp_path / "dora", tmp_path / "lora", base=llama)
    assert other.weight_error == pytest.approx(report.weight_error, rel=1e-3)


def test_without_a_base_it_says_what_it_needs(llama: Path, tmp_path: Path) -> None:
    saved(llama, peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj"]), tmp_path)
    with pytest.raises(AdapterError, match="depends on its base model: give it with --base"):
        surgery.convert(tmp_path, "lora", rank=2)
