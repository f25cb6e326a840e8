"""Training on other labels than the head's, and the lines that explain a training."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf

import surgery
from surgery.errors import DataError, OptionError
from tests.helpers.command_line import invoke
from tests.helpers.models import build
from tests.helpers.texts import save_tokenizer, text_rows, write_rows


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A bare BERT, a LoRA with a head of two classes, and data of three named ones."""
    build("bert").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    rows = [{**row, "label": ("no", "yes", "so")[row["label"]]} for row in text_rows(12, labels=3)]
    write_rows(tmp_path / "data.jsonl", rows)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=2)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    return tmp_path


def test_other_labels_say_what_to_do(place: Path) -> None:
    with pytest.raises(DataError, match=r"none of the model's 2 classes.*--new-head"):
        surgery.train(place / "lora", place / "model", place / "data.jsonl", steps=1)


def test_a_new_head_has_the_datas_classes(place: Path) -> None:
    out = place / "out"
    trained, report = surgery.train(
        place / "lora", place / "model", place / "data.jsonl", out=out, steps=2, new_head=True
    )
    assert trained.modules["classifier"]["weight"].shape == (3, 32)
    assert trained.provenance["labels"] == ["no", "so", "yes"]
    assert report.before is not None and report.before.score == "accuracy"
    model = surgery.load(out, place / "model")
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 3)


def test_a_new_head_needs_a_task_with_classes(llama: Path, place: Path) -> None:
    surgery.init(llama, "vera", place / "start")
    with pytest.raises(OptionError, match="--task seq-cls"):
        surgery.train(place / "start", llama, place / "data.jsonl", steps=1, new_head=True)


def test_rate_schedule_and_time_are_said(place: Path) -> None:
    result = invoke(
        *("train", place / "lora", "--base", place / "model", "--data", place / "data.jsonl", "--new-head"),
        *("--steps", 20, "--batch-size", 4, "--warmup", 0.1, "-o", place / "out"),
    )
    assert result.exit_code == 0, result.stderr
    assert re.search(
        r"20 steps of 4 samples: 6\.67 times through 12 samples; the learning rate \S+ \(the default of this adapter\) "
        r"rises for 2 steps, then falls to 0 in a line",
        result.stderr,
    )
    assert re.search(r"\S+ s a step: about \d+ s for the 14 steps that are left", result.stderr)
