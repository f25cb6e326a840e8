"""Our types: each weight change is that of its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import surgery
from tests.helpers.models import load_base, perturb
from tests.helpers.weight_changes import CHANGED, check_changes


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("method", ["vera", "inilora", "frod", "smoa"])
def test_own_types_and_vera(method: str, kind: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    surgery.init(folder, method, tmp_path / "start", target=CHANGED[kind])
    model = PeftModel.from_pretrained(load_base(folder), tmp_path / "start", is_trainable=True)
    perturb(model)
    model.save_pretrained(tmp_path / "trained")
    check_changes(model, tmp_path / "trained")


def test_what_stores_its_factors_needs_no_weight(llama: Path) -> None:
    """The layer's height and width are then told by its tensors."""
    adapter, _ = surgery.init(llama, "inilora", rank=3, target=["k_proj"], store_bases=True)
    name = next(iter(adapter.modules))
    own = adapter.layer(name)
    for short in ("inilora_A", "inilora_B"):
        own[short] += torch.randn(own[short].shape, generator=torch.Generator().manual_seed(0))
    weight = load_base(llama).get_submodule(name).weight.detach()
    delta = adapter.delta(name)
    assert delta.shape == weight.shape and float(delta.norm()) > 1
    torch.testing.assert_close(delta.dense(), adapter.delta(name, weight).dense())
