"""Adapters of several types to export, and a small Qwen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf

import surgery
from tests.helpers.adapters import make_adapter
from tests.helpers.models import VOCAB, spread

NAMES = ["q_proj", "k_proj", "v_proj", "down_proj"]


def stock(config: Callable[[], Any]) -> Callable[[Path, Path], Path]:
    return lambda base, folder: make_adapter(base, folder, config())


def converted(to: str, **options: Any) -> Callable[[Path, Path], Path]:
    def made(base: Path, folder: Path) -> Path:
        plain = make_adapter(base, folder.with_name("plain"), lora())
        surgery.convert(plain, to, folder, base=base, **options)
        return folder

    return made


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": NAMES, "task_type": "CAUSAL_LM", **settings})


def qwen(folder: Path, **settings: Any) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e6}  # which is what mlx-lm takes where it reads none
    config = tf.Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, rope_parameters=rope, **{**sizes, **settings})
    torch.manual_seed(0)
    model = tf.Qwen2ForCausalLM(config)
    spread(model)
    model.save_pretrained(folder)
    return folder
