"""LoRA: every layer's change, and a bias of lora_B."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

import surgery
from surgery.adapters.contents import contents_of, refuse_output_biases
from surgery.errors import AdapterError
from tests.helpers.models import edit_tensors, load_base
from tests.helpers.stock_adapters import FILE, LORA, TARGETS, check_all, saved
from tests.helpers.weight_changes import CHANGED, check_changes, lora_with_bias


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
    config = LoraConfig(**{"r": 4, "target_modules": CHANGED["llama"], **settings}, init_lora_weights=False)
    model = get_peft_model(load_base(llama), config)
    model.save_pretrained(tmp_path / "lora")
    check_changes(model, tmp_path / "lora")


def test_a_bias_of_lora_b_is_kept_in_a_lora(llama: Path, tmp_path: Path) -> None:
    adapter = lora_with_bias(llama, tmp_path / "lora")
    made, _ = surgery.convert(adapter, "lora", tmp_path / "made", energy=1.0)
    module = "model.layers.1.self_attn.q_proj"
    want, found = (contents_of(each).output_bias(module) for each in (adapter, made))
    assert want is not None and found is not None and want.any() and torch.allclose(found, want)


def test_a_bias_of_lora_b_that_is_lost_is_named(llama: Path, tmp_path: Path) -> None:
    adapter = lora_with_bias(llama, tmp_path / "lora")
    with pytest.raises(AdapterError, match=r"a bias to the outputs of model\.layers\.1\.self_attn\.q_proj"):
        surgery.convert(adapter, "giva", energy=1.0)
    zeros = {n: torch.zeros_like(t) if n.endswith("bias") else t for n, t in adapter.tensors.items()}
    surgery.convert(surgery.Adapter(adapter.config, zeros), "giva", energy=1.0, bits=32)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", LORA)
def test_lora(name: str, kind: str, model_folder, tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": TARGETS[kind], **LORA[name]}
    config = peft.LoraConfig(fan_in_fan_out=kind == "gpt2", **settings)
    saved(model_folder(kind), config, tmp_path)
    check_all(model_folder(kind), tmp_path)


def test_the_bias_of_lora_b_is_a_part_of_the_layer(model_folder, tmp_path: Path) -> None:
    saved(model_folder("bert"), peft.LoraConfig(r=2, target_modules=["query"], lora_bias=True), tmp_path)
    contents = contents_of(surgery.Adapter.open(tmp_path))
    assert not contents.carried and len(contents.modules) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_converted_adapter_of_a_mutating_start_is_read(start: str, llama: Path, tmp_path: Path) -> None:
    """PEFT's own conversion on saving makes it a plain LoRA on the original base."""
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=start)
    original = load_base(llama)
    model = get_peft_model(load_base(llama), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = surgery.Adapter.open(tmp_path / "converted")
    assert adapter.config["init_lora_weights"] is True and adapter.config["r"] == 8
    merged = model.merge_and_unload()
    for module in contents_of(adapter).modules:
        before, after = (m.get_submodule(module).weight.detach() for m in (original, merged))
        torch.testing.assert_close(before + adapter.delta(module).dense(), after, atol=1e-5, rtol=0)


def test_a_bias_of_lora_b_is_lost_to_no_other_form(llama: Path, tmp_path: Path) -> None:
    """One number of it is enough; none is no bias."""
    saved(llama, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), tmp_path)

    def leave(numbers: int) -> None:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            for tensor in (each for name, each in tensors.items() if name.endswith("lora_B.bias")):
                tensor.zero_()
                tensor[:numbers] = 1

        edit_tensors(tmp_path, edit, FILE)

    leave(0)
    refuse_output_biases(contents_of(surgery.Adapter.open(tmp_path)))
    leave(1)
    with pytest.raises(AdapterError, match="adds a bias"):
        refuse_output_biases(contents_of(surgery.Adapter.open(tmp_path)))
