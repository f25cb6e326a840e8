"""Adapter types of PEFT with their configurations."""

from __future__ import annotations

from typing import Any

import peft

# A base model, the adapter's configuration, and whether a LoRA holds it.

NAMES = ["q_proj", "k_proj", "down_proj"]


def ia3(targets: list[str], feedforward: list[str]) -> peft.PeftConfig:
    return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)


def randlora(**settings: Any) -> peft.PeftConfig:
    return peft.RandLoraConfig(save_projection=False, target_modules=NAMES, **settings)


KINDS: dict[str, tuple[str, Any, bool]] = {
    "adalora": ("llama", lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, target_modules=NAMES), True),
    "ia3": ("llama", lambda: ia3(NAMES, ["down_proj"]), False),
    "ia3 with biases": ("bert", lambda: ia3(["key", "value"], []), False),
    "ia3 of Conv1D": ("gpt2", lambda: ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"]), False),
    "randlora drawn again": ("llama", lambda: randlora(r=4), True),
    "sparse randlora": ("llama", lambda: randlora(r=5, sparse=True), True),
}
