"""Trained adapters of every kind of model, and the check of a merge against PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

import surgery
from tests.helpers.models import (
    llama_config,
    load_base,
    model_inputs,
    output,
    relative_difference,
    spread,
)
from tests.helpers.stock_adapters import randomise


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in kind else torch.float32


def trained(base: Any, config: peft.PeftConfig, out: Path) -> Path:
    """An adapter with values in every tensor that trains, saved by PEFT."""
    model = get_peft_model(base, config)
    randomise(model)
    model.save_pretrained(out)
    return out


def outputs(model: Any, kind: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return output(model.eval(), model_inputs(kind.split("-", maxsplit=1)[0]))


def check_merged(adapter: Path, base: Path, kind: str, out: Path, **options: Any) -> Any:
    """Merge, and compare every parameter and the outputs with PEFT's merge; returns the report."""
    report = surgery.merge(adapter, base, out, **options)
    dtype = dtype_of(kind)
    reference = PeftModel.from_pretrained(load_base(base, dtype), adapter).merge_and_unload()
    found = load_base(out, dtype)
    expected = dict(reference.named_parameters())
    for name, parameter in found.named_parameters():
        assert parameter.dtype == dtype
        # One rounding of each of two float32 sums that add in another order.
        tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(parameter, expected[name], rtol=tolerance, atol=tolerance)
    difference = relative_difference(outputs(found, kind), outputs(reference, kind))
    assert difference < (2e-2 if dtype == torch.bfloat16 else 2e-5)
    # A control: the adapter does something.
    assert relative_difference(outputs(load_base(base, dtype), kind), outputs(reference, kind)) > 0.03
    return report


TARGETS = {
    "bert": ["query", "dense"],
    "llama": ["q_proj", "k_proj", "down_proj"],
    "llama-bf16-sharded": ["q_proj", "k_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "k", "wo"],
    "vit": ["q_proj", "fc1"],
}

STOCK: dict[str, peft.PeftConfig] = {
    "rslora": peft.LoraConfig(r=4, use_rslora=True, alpha_pattern={"k_proj": 3}),
    "loha": peft.LoHaConfig(r=2),
    "lokr": peft.LoKrConfig(r=2),
    "hira": peft.HiraConfig(r=2),
    "randlora": peft.RandLoraConfig(r=5, randlora_alpha=5),
    "vera": peft.VeraConfig(r=5),
    "vera from its seed": peft.VeraConfig(r=5, save_projection=False),
}


def tied_llama(folder: Path, tie: bool = True) -> Path:
    """A Llama whose embedding is its output head, too."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(llama_config(tie_word_embeddings=tie))
    spread(model)
    model.save_pretrained(folder)
    return folder
