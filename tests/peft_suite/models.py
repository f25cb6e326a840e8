"""The models that PEFT's tests name, made from configurations: a hub cache of tiny ones with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf

from tests.helpers.models import spread

__all__ = ["SIMILAR", "make_hub_cache"]

REVISION = "0" * 40
SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {**SIZES, "num_key_value_heads": 2}
GPT = {
    "vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Repository -> model class, and the configuration's class with what differs from its defaults.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", GPT),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 8}
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 1024, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": 1024, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
         "forced_eos_token_id": None},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", SIZES),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", SIZES),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification", "BertConfig", SIZES
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification", "RobertaConfig", SIZES
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification", "LlamaConfig", LLAMA
    ),
}  # fmt: skip
# Models of the same kinds of layers as others: tests on them run only with --all-models.
SIMILAR = (
    "peft-internal-testing/tiny-random-GPTJForCausalLM",
    "peft-internal-testing/tiny-dummy-qwen2",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM",
    "peft-internal-testing/tiny-random-RobertaModel",
    "peft-internal-testing/tiny-random-DebertaModel",
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
)
# A repository of an adapter, of which one test reads the configuration.
ADAPTER, ADAPTER_REVISION = "peft-internal-testing/tiny-opt-lora-revision", "test"


def make_hub_cache(folder: Path) -> None:
    """Fill a hub cache, in which the Hub's own client then finds the models by their names without a network."""
    for repository, (model_class, config_class, settings) in MODELS.items():
        snapshot = _snapshot(folder, repository, "main")
        if not (snapshot / "config.json").is_file():
            torch.manual_seed(0)
            model = getattr(tf, model_class)(getattr(tf, config_class)(**settings))
            spread(model)
            model.save_pretrained(snapshot)
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(str(_snapshot(folder, ADAPTER, ADAPTER_REVISION)))


def _snapshot(folder: Path, repository: str, reference: str) -> Path:
    """Return the folder of a repository's only revision, which `reference` names."""
    place = folder / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / reference).write_text(REVISION, encoding="ascii")
    return place / "snapshots" / REVISION
