"""A LoRA for servers."""

from __future__ import annotations

from typing import Any

import peft


def lora(targets: list[str], **settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)
