"""Weight changes read straight from adapter files equal what PEFT's layers compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import surgery
from surgery.errors import AdapterError
from tests.models import load_base
from tests.test_initialization import perturb

TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "t5": ["q", "wo"]}


def check_all(model: PeftModel, folder: Path) -> None:
    """Every layer's change, from the file and from the live layer."""
    adapter = surgery.Adapter.open(folder)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert layers
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight.detach()
        transposed = type(layer.get_base_layer()).__name__ == "Conv1D"
        delta = adapter.delta(name, weight.T if transposed else weight)
        expected = layer.get_delta_weight("default").detach()
        expected = expected.T if transposed else expected
        assert float(expected.abs().max()) > 1e-3
        assert torch.allclose(delta.dense(), expected, atol=1e-5 * float(expected.abs().max().clamp_min(1))), name


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("method", ["vera", "inilora", "frod", "smoa"])
def test_own_types_and_vera(method: str, kind: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    surgery.init(folder, method, tmp_path / "start", target=TARGETS[kind])
    model = PeftModel.from_pretrained(load_base(folder), tmp_path / "start", is_trainable=True)
    perturb(model)
    model.save_pretrained(tmp_path / "trained")
    check_all(model, tmp_path / "trained")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 5, r"layers.1.*down_proj": 7}},
    ],
)
def test_stock_lora(settings, llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS["llama"], **settings}, init_lora_weights=False)
    model = get_peft_model(load_base(llama), config)
    model.save_pretrained(tmp_path / "lora")
    check_all(model, tmp_path / "lora")


def test_what_cannot_be_said_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter, _ = surgery.init(llama, "frod", target=["q_proj"])
    name = "model.layers.1.self_attn.q_proj"
    with pytest.raises(AdapterError, match="needs the base weight"):
        adapter.delta(name)
    with pytest.raises(AdapterError, match="no module 'nowhere'"):
        adapter.delta("nowhere")
    with pytest.raises(AdapterError, match="how wide"):
        surgery.init(llama, "vera", target=["q_proj"])[0].delta(name)
    for method in ("vera", "inilora"):
        bare, _ = surgery.init(llama, method, target=["q_proj"], store_bases=False)
        with pytest.raises(AdapterError, match=r"surgery\.load"):
            bare.delta(name)
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    get_peft_model(load_base(llama), config).save_pretrained(tmp_path / "dora")
    with pytest.raises(AdapterError, match="DoRA"):
        surgery.Adapter.open(tmp_path / "dora").delta(name)
