"""Packed experts inside PEFT: they train, merge and unload."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from tests.helpers.expert_cases import made_on_experts
from tests.helpers.models import load_base


@pytest.mark.filterwarnings("ignore")
def test_packed_experts_train_merge_and_unload(tmp_path: Path) -> None:
    base, made = made_on_experts(tmp_path)
    giva, report = surgery.convert(made, "giva", tmp_path / "giva", base=base, ratio=8)
    assert report.kept > 0.3 and set(giva.config["target_parameters"]) >= {"model.layers.0.mlp.experts.down_proj"}
    model = surgery.load(tmp_path / "giva", load_base(base), is_trainable=True)
    ids = torch.arange(3, 33).reshape(2, 15)
    want = model(input_ids=ids, labels=ids)
    want.loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "experts" in n and n.endswith("giva_o.default")]
    assert gradients and any(g is not None and bool(g.any()) for g in gradients)
    model.merge_adapter()
    merged = model(input_ids=ids).logits
    model.unmerge_adapter()
    again = model(input_ids=ids).logits
    with model.disable_adapter():
        bare = model(input_ids=ids).logits
    assert torch.equal(bare, load_base(base)(input_ids=ids).logits) and torch.equal(again, want.logits)
    assert torch.allclose(merged, want.logits, atol=1e-4) and not torch.allclose(bare, merged, atol=1e-2)
    model.save_pretrained(tmp_path / "again")
    assert surgery.compare(tmp_path / "giva", tmp_path / "again").weight_error < 1e-6
    unloaded = model.merge_and_unload()
    assert torch.allclose(unloaded(input_ids=ids).logits, merged, atol=1e-5)
    assert type(unloaded.get_submodule("model.layers.0.mlp.experts")).__name__ == "Qwen3MoeExperts"
