"""Trained LoRAs to convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.helpers.models import llama_config, load_base, model_inputs, output, save_model
from tests.helpers.texts import save_tokenizer


def trained(model: Any, config: Any, folder: Path, seed: int = 0) -> Path:
    """A stock adapter as after training: its starting zeros replaced, ranks of falling weight."""
    torch.manual_seed(seed)  # PEFT's own start is drawn as well
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                falling = torch.logspace(0, -1.5, parameter.shape[1])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 * falling)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Path:
    """A LoRA on all linears of the tiny Llama."""
    torch.manual_seed(0)  # PEFT draws A, not from what other tests have left
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return trained(load_base(llama), config, tmp_path / "source")


WEIGHTS = "adapter_model.safetensors"


def logits(folder: Path, adapter: Path, kind: str = "llama") -> torch.Tensor:
    """What the model says with an adapter, opened by PEFT."""
    model = PeftModel.from_pretrained(load_base(folder), adapter).eval()
    with torch.no_grad():
        return output(model, model_inputs(kind))


def dense(adapter: Path, module: str) -> torch.Tensor:
    """The weight change by its definition, float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / WEIGHTS)
    B, A = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
    rank = A.shape[0]
    alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
    return B @ A * (alpha / rank)


@pytest.fixture
def headed(tmp_path: Path) -> Path:
    """A LoRA beside a head that is most of its file."""
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(llama_config(num_labels=700, pad_token_id=0))
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    return trained(model, config, tmp_path / "headed")


def head_bytes(folder: Path) -> int:
    return sum(t.nbytes for name, t in load_file(folder / WEIGHTS).items() if "score" in name)


def readers(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """dW of every layer by the rules of llama.cpp (alpha / own rank) and of SGLang (alpha / r)."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
    found: dict[str, dict[str, torch.Tensor]] = {"llama.cpp": {}, "sglang": {}}
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = tensors[name.replace("lora_A", "lora_B")].double() @ A.double()
            found["llama.cpp"][module] = config["lora_alpha"] / A.shape[0] * product
            found["sglang"][module] = config["lora_alpha"] / config["r"] * product
    return found


@pytest.fixture
def text_llama(tmp_path: Path) -> Path:
    """The tiny Llama with a tokenizer; its weights are those of `llama`."""
    return save_tokenizer(save_model("llama", tmp_path / "text-llama"))
