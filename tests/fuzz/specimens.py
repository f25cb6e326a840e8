"""Whole folders, to be broken: tiny models, and adapters of every kind that is read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import surgery
from surgery.adapters.types.through_peft import THROUGH_PEFT
from tests.helpers.kinds import base_of
from tests.helpers.models import VOCAB, llama_config, load_base, spread
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

__all__ = ["ADAPTERS", "BASES", "ELSEWHERE", "STOCK", "make_specimens"]

BASES = ("model", "sharded", "classifier", "experts", "images")
TARGETS = ["q_proj", "v_proj"]
LLAMA: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
# Types that are read through PEFT: their settings for layers of 16 x 16 and 8 x 16.
THROUGH: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 8},
    "DEFT": {"r": 2},
    "DELORA": {"r": 2},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "MISS": {"r": 2},
    "PEANUT": {"r": 2},
    "PSOFT": {"r": 2},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"r": 2, "num_vectors": 16, "vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
}
STOCK: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, lora_alpha=4, **LLAMA),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=4, **LLAMA),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=4, **LLAMA),
    "hira": lambda: peft.HiraConfig(r=2, **LLAMA),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **LLAMA),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, **LLAMA),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "randlora": lambda: peft.RandLoraConfig(r=2, **LLAMA),
    "stock-vera": lambda: peft.VeraConfig(r=2, save_projection=True, **LLAMA),
    "lora-biases": lambda: peft.LoraConfig(r=2, lora_bias=True, rank_pattern={"v_proj": 1}, **LLAMA),
    "embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[1, 5], **LLAMA),
    **{kind.lower(): (lambda kind=kind: _through(kind)) for kind in THROUGH_PEFT},
}
WEIGHTS = "adapter_model.safetensors"
OWN: dict[str, dict[str, Any]] = {
    "vera": {"rank": 4},
    "inilora": {"rank": 2},
    "inilora-on-base": {"rank": 2, "store_bases": False},
    "frod": {},
    "smoa": {"rank": 2},
    "smoa-components": {"rank": 2, "variant": "components"},
}
# Files that other tools or versions write: each is made from the plain LoRA.
FILES = ("mlx", "bin", "pieces")
# Adapters of another base than the Llama: name -> base.
ELSEWHERE = {"head": "classifier", "on-experts": "experts", "convolution": "images"}
ADAPTERS = (*STOCK, *OWN, *FILES, *ELSEWHERE, "giva", "packed")


def make_specimens(folder: Path) -> None:
    """Make every base model in `BASES`, every adapter in `ADAPTERS`, and data files.

    The models are a Llama in one file and in several, a BERT with three labels, a mixture of experts and a ResNet; the
    adapters in `ELSEWHERE` are for the last three.
    """
    _bases(folder)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of types that are on trial there
        for name, config in STOCK.items():
            _stock(folder / name, load_base(folder / "model"), config())
    head = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    _stock(folder / "head", load_base(folder / "classifier"), head)
    experts = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    _stock(folder / "on-experts", load_base(folder / "experts"), experts)
    images = peft.LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"])
    _stock(folder / "convolution", load_base(folder / "images"), images)
    _files_of_others(folder)
    save_tokenizer(folder / "lora", chat_template="{{ messages }}")  # files that go where the adapter goes
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
    base_of("qwen_moe", folder / "experts")
    base_of("resnet", folder / "images")
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


def _through(kind: str) -> Any:
    """The configuration of a type that is read through PEFT; a type without settings here is an error."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {str(getattr(name, "value", name)): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return known[kind](target_modules=TARGETS, **THROUGH[kind])


def _files_of_others(folder: Path) -> None:
    """The plain LoRA in a pickle, in several files, and as mlx-lm writes it."""
    config, tensors = (folder / "lora" / "adapter_config.json").read_text(), load_file(folder / "lora" / WEIGHTS)
    for name in ("bin", "pieces"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(config)
    torch.save(tensors, folder / "bin" / "adapter_model.bin")
    pieces = {key: f"adapter_model-0000{number % 2 + 1}-of-00002.safetensors" for number, key in enumerate(tensors)}
    for file in set(pieces.values()):
        save_file({key: tensors[key] for key in pieces if pieces[key] == file}, folder / "pieces" / file)
    (folder / "pieces" / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": pieces}))
    surgery.export(folder / "lora", "mlx", folder / "mlx", base=folder / "model")


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
