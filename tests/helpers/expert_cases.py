"""Adapters on fused experts."""

from __future__ import annotations

from pathlib import Path

import peft

from tests.helpers.kinds import base_of, trained

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def made_on_experts(folder: Path, kind: str = "qwen_moe") -> tuple[Path, Path]:
    base = base_of(kind, folder / "base")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=BOTH)
    trained(base, folder / "made", config, 0.3)
    return base, folder / "made"
