"""Adapters of several types to export, and a small Qwen."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import surgery
from surgery.adapters.format_registry import AdapterParts
from surgery.exporting.export import target_format
from tests.helpers.adapters import make_adapter
from tests.helpers.models import VOCAB, load_base, perturb, spread
from tests.helpers.through_peft import KINDS

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


def gguf_lora(targets: list[str], **settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)


needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="the gguf package is not installed")
TARGETS = [
    "vllm",
    "sglang",
    "mlx",
    pytest.param("llama.cpp", marks=needs_gguf),
    pytest.param("ollama", marks=needs_gguf),
]


def own(method: str) -> Callable[[Path, Path], Path]:
    def made(base: Path, folder: Path) -> Path:
        surgery.init(base, method, folder.with_name("start"), target=NAMES)
        model = peft.PeftModel.from_pretrained(load_base(base), folder.with_name("start"), is_trainable=True)
        perturb(model)
        model.save_pretrained(folder)
        return folder

    return made


# Types that a LoRA holds exactly, and those whose change has full rank.
EXACT: dict[str, Callable[[Path, Path], Path]] = {
    "lora": stock(lora),
    "lora with patterns": stock(lambda: lora(rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 11})),
    "rslora": stock(lambda: lora(use_rslora=True)),
    "adalora": stock(lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, target_modules=NAMES)),
    "loha": stock(lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=NAMES)),
    "lokr": stock(lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=NAMES, decompose_both=True)),
    "vera": stock(lambda: peft.VeraConfig(r=5, target_modules=["q_proj"])),
    "randlora": stock(lambda: peft.RandLoraConfig(r=8, target_modules=["q_proj"], save_projection=True)),
    "packed giva": converted("giva", energy=1.0),
    "inilora": own("inilora"),
}


FULL: dict[str, Callable[[Path, Path], Path]] = {
    "dora": stock(lambda: lora(use_dora=True)),
    "hira": stock(lambda: peft.HiraConfig(r=4, target_modules=NAMES)),
    "ia3": stock(lambda: peft.IA3Config(target_modules=NAMES, feedforward_modules=["down_proj"])),
    "frod": own("frod"),
    "smoa": own("smoa"),
}
FULL |= {
    name.lower(): stock(
        lambda config=config, settings=settings: config(target_modules=["q_proj", "v_proj"], **settings)
    )
    for name, (config, settings) in KINDS.items()
}


def written_changes(to: str, folder: Path, parts: AdapterParts) -> dict[str, torch.Tensor]:
    """dW of the files by the target's rule, under the model's names and with the model's rows."""
    target = target_format(to)
    modules = {place.name: (module, place.rows) for module, place in target.places(parts).items()}
    found = {}
    for name, change in target.changes(folder):
        module, rows = modules[name]
        back = change.clone()
        if rows is not None:
            back[rows] = change
        found[module] = back.double()
    return found


def difference(want: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Root of the summed squared differences over that of the wanted changes; what only one has counts as zeros."""
    zeros = {name: torch.zeros(1, dtype=torch.float64) for name in {*want, *found}}
    lost = sum(float((want.get(name, zeros[name]) - found.get(name, zeros[name])).square().sum()) for name in zeros)
    return (lost / sum(float(change.square().sum()) for change in want.values())) ** 0.5
