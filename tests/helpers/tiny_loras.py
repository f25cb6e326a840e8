"""Tiny LoRAs by the dozen, written without a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["write_lora", "write_loras"]

WIDTH, RANK = 32, 4
LAYERS = ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.self_attn.q_proj")


def write_lora(folder: Path, seed: int = 0, prefix: str = "base_model.model.model.") -> Path:
    """Write the LoRA of a Llama of width 32; returns `folder`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in LAYERS:
        tensors[f"{prefix}{layer}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator)
        tensors[f"{prefix}{layer}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_loras(folder: Path, count: int) -> Path:
    """Write so many different ones, `lora-00` and on; returns `folder`."""
    for index in range(count):
        write_lora(folder / f"lora-{index:02}", index)
    return folder
