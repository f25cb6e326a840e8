"""The check of a weight change against the live model."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import surgery
from surgery.adapters.names import MODEL_PREFIX
from tests.helpers.models import load_base

CHANGED = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "t5": ["q", "wo"]}


def check_changes(model: PeftModel, folder: Path) -> None:
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


def many_layers(count: int) -> surgery.Adapter:
    """A LoRA on one linear of each of many blocks."""
    tensors = {}
    for index in range(count):
        for name, shape in (("A", (1, 3)), ("B", (2, 1))):
            tensors[f"{MODEL_PREFIX}blocks.{index}.fc.lora_{name}.weight"] = torch.full(shape, 1.0 + index)
    return surgery.Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 2}, tensors)


def lora_with_bias(llama: Path, folder: Path) -> surgery.Adapter:
    """A LoRA whose B has a bias of 0.5 in the second block, and of zeros elsewhere."""
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    model = get_peft_model(load_base(llama), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.fill_(0.5 if ".1." in name else 0.0)
    model.save_pretrained(folder)
    return surgery.Adapter.open(folder)
