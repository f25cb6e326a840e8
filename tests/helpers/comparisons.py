"""Pairs of adapters, texts and classifiers to compare, and the divergence by its definition."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file

import surgery
from tests.helpers.merges import trained
from tests.helpers.models import edit_tensors, load_base, perturb, start_options
from tests.helpers.stock_adapters import randomise
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

FILE = "adapter_model.safetensors"
LORA = peft.LoraConfig


def lora(folder: Path, out: Path, scale: float = 1.0, **options: Any) -> Path:
    """A LoRA saved by PEFT; `scale` makes its B another."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
    made = trained(load_base(folder), LORA(**{**settings, **options}), out)
    edit_tensors(made, lambda tensors: [t.mul_(scale) for name, t in tensors.items() if "lora_B" in name], FILE)
    return made


@pytest.fixture
def pair(llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two LoRAs of other ranks; the second leaves a role alone and changes another."""
    a = lora(llama, tmp_path / "a", task_type="CAUSAL_LM")
    b = lora(llama, tmp_path / "b", 0.3, r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    return a, b


@pytest.fixture
def texts(llama: Path, tmp_path: Path) -> Path:
    """Texts for the tiny Llama, which gets a tokenizer."""
    if not (llama / "tokenizer.json").exists():
        save_tokenizer(llama)
    return write_rows(tmp_path / "texts.jsonl", text_rows(11))


def start(method: str, base: Path, out: Path, store: bool = True) -> Path:
    """An adapter of ours that has been trained, as `save_pretrained` leaves it."""
    options = {"store_bases": False} if not store else {}
    rank = {} if method == "frod" else {"rank": 4}
    surgery.init(base, method, out.with_name(f"{out.name}-start"), **start_options(method, "llama"), **rank, **options)
    model = surgery.load(out.with_name(f"{out.name}-start"), load_base(base), is_trainable=True)
    perturb(model)
    model.save_pretrained(out)
    return out


def logits(folder: Path | None, base: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """What PEFT's model answers, text by text, in float64: every token but the last, or the class."""
    model = PeftModel.from_pretrained(base, folder).eval() if folder is not None else base
    rows = []
    with torch.no_grad():
        for text in texts:
            output = model(**tokenizer(text, return_tensors="pt")).logits.double()
            rows.append(output[0, :-1] if output.ndim == 3 else output)
    return torch.cat(rows)


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


CLASSES = 5


@pytest.fixture
def classifiers(model_folder, tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """A bare BERT, two classifiers on it by PEFT with heads of their own, and labelled texts."""
    folder = tmp_path / "bert"
    shutil.copytree(model_folder("bert"), folder)
    save_tokenizer(folder, ends_texts=True)
    config = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    for name, rank, size in (("a", 3, 1.0), ("b", 2, 0.5)):
        base = tf.BertForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
        model = peft.get_peft_model(base, LORA(r=rank, **config))
        randomise(model)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.mul_(size if "lora_B" in key else 1)
        model.save_pretrained(tmp_path / name)
    rows = text_rows(12, labels=CLASSES)
    return folder, tmp_path / "a", tmp_path / "b", write_rows(tmp_path / "labelled.jsonl", rows)


def classifier(folder: Path, head: Path | None = None) -> Any:
    model = tf.BertForSequenceClassification.from_pretrained(folder, num_labels=CLASSES).eval()
    if head is not None:
        tensors = load_file(head / FILE)
        brought = {f"classifier.{name}": tensors[f"base_model.model.classifier.{name}"] for name in ("weight", "bias")}
        model.load_state_dict(brought, strict=False)
    return model
