"""Other tools' adapter formats are recognised by name, and PEFT's own names are not taken for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.adapters.foreign_formats import foreign_format
from surgery.errors import AdapterError

FOREIGN = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "kohya",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "kohya",
    "transformer_blocks.0.attn.to_q.lora_up.weight": "kohya",
    "unet.down_blocks.0.attentions.0.to_q.lora.down.weight": "diffusers",
    "down_blocks.0.attentions.0.processor.to_q_lora.up.weight": "diffusers",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": "diffusers",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "diffusers",
    "diffusion_model.layers.0.attention.to_q.lora_A.weight": "ComfyUI",
    "model.layers.0.self_attn.q_proj.lora_a": "MLX",
    "model.layers.0.self_attn.q_proj.lora_A.weight": "bare state dict",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": "adapter's name",
}
OURS = [
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.encoder.layer.0.attention.self.query.lora_B.bias",
    "base_model.model.transformer.h.0.attn.c_attn.hada_w1_a",
    "base_model.model.unet.lm_head.lora_B.weight",
    "base_model.model.classifier.weight",
    "base_model.vera_A",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_each_format_is_named(name: str) -> None:
    found = foreign_format([OURS[0], name])
    assert found is not None and FOREIGN[name] in found and name in found


def test_peft_names_are_not_foreign() -> None:
    assert foreign_format(OURS) is None
    assert foreign_format([]) is None


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapters.safetensors", "my_lora.safetensors"])
def test_a_folder_without_configuration_names_the_format(name: str, tmp_path: Path) -> None:
    save_file({next(iter(FOREIGN)): torch.zeros(2, 2)}, tmp_path / name)
    with pytest.raises(AdapterError, match=f"no adapter_config.json; {name} is no PEFT adapter.*kohya.*diffusers"):
        surgery.Adapter.open(tmp_path)


def test_a_base_model_is_said_to_be_one(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="this is a base model, not an adapter"):
        surgery.Adapter.open(llama)
    with pytest.raises(AdapterError, match="this is not an adapter folder"):
        surgery.Adapter.open(tmp_path)
