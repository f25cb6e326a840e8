"""Whole folders, to be broken: tiny models, and adapters of every kind that is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf

import surgery
from tests.helpers.models import VOCAB, llama_config, load_base, spread
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

__all__ = ["ADAPTERS", "BASES", "make_specimens"]

BASES = ("model", "sharded", "classifier")
STOCK: dict[str, Callable[..., Any]] = {
    "lora": lambda targets: peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"),
    "loha": lambda targets: peft.LoHaConfig(r=2, alpha=4, target_modules=targets, task_type="CAUSAL_LM"),
    "lokr": lambda targets: peft.LoKrConfig(r=2, alpha=4, target_modules=targets, task_type="CAUSAL_LM"),
    "hira": lambda targets: peft.HiraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"),
    "dora": lambda targets: peft.LoraConfig(r=2, target_modules=targets, use_dora=True, task_type="CAUSAL_LM"),
}
OWN: dict[str, dict[str, Any]] = {
    "vera": {"rank": 4},
    "inilora": {"rank": 2},
    "inilora-on-base": {"rank": 2, "store_bases": False},
    "frod": {},
    "smoa": {"rank": 2},
    "smoa-components": {"rank": 2, "variant": "components"},
}
ADAPTERS = (*STOCK, *OWN, "head", "giva", "packed")
TARGETS = ["q_proj", "v_proj"]


def make_specimens(folder: Path) -> None:
    """Make every base model in `BASES`, every adapter in `ADAPTERS`, and data files.

    The models are a Llama in one file and in several, and a BERT with three labels; `head` is a LoRA on that one.
    """
    _bases(folder)
    torch.manual_seed(0)
    for name, config in STOCK.items():
        _stock(folder / name, load_base(folder / "model"), config(list(TARGETS)))
    head = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    _stock(folder / "head", load_base(folder / "classifier"), head)
    for name, options in OWN.items():
        method = name.partition("-")[0]
        surgery.init(folder / "model", method, folder / name, target=TARGETS, **options)
        _move(folder / name)
    surgery.init(
        folder / "model", "giva", folder / "giva", target=TARGETS, rank=2, data=folder / "data.jsonl", samples=4
    )
    _move(folder / "giva")
    surgery.convert(folder / "lora", "giva", folder / "packed", rank=2, bits=8)
    for name in ADAPTERS:
        _name_base(folder / name / "adapter_config.json")


def _bases(folder: Path) -> None:
    torch.manual_seed(0)
    llama = tf.LlamaForCausalLM(llama_config(num_hidden_layers=2, hidden_size=16, intermediate_size=24))
    spread(llama)
    llama.eval().save_pretrained(folder / "model")
    llama.save_pretrained(folder / "sharded", max_shard_size="8KB")
    assert (folder / "sharded" / "model.safetensors.index.json").is_file()
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    classifier = tf.BertForSequenceClassification(config)
    spread(classifier)
    classifier.eval().save_pretrained(folder / "classifier")
    for name in BASES:
        save_tokenizer(folder / name)
    write_rows(folder / "data.jsonl", text_rows(12))
    write_rows(folder / "labelled.jsonl", text_rows(12, labels=3))


def _stock(folder: Path, base: Any, config: Any) -> None:
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)


def _move(folder: Path) -> None:
    """Bring an adapter away from its start, as training would: where it trains, it is no longer at dW = 0."""
    adapter = surgery.Adapter.open(folder)
    kept = ("_A0", "_B0", "_l0", "_V", "vera_A", "vera_B", "giva_A", "giva_B")
    for name, tensor in adapter.tensors.items():
        if tensor.is_floating_point() and not name.endswith(kept):
            adapter.tensors[name] = tensor + torch.randn_like(tensor) * 0.02
    adapter.save(folder, force=True)


def _name_base(path: Path) -> None:
    """A base as published adapters name it: a Hub id."""
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "org/base"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
