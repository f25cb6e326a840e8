"""Losses before and after a training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

import surgery
from tests.helpers.training_trained import QUICK


def naive_scores(adapter: Path, trained_place: Path) -> tuple[float, float]:
    """Loss and accuracy on the other texts, sample by sample in double precision."""
    model = surgery.load(adapter, trained_place / "bert").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(trained_place / "bert")
    losses, right = [], 0
    for line in (trained_place / "others.jsonl").read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        losses.append(float(F.cross_entropy(logits, torch.tensor([row["label"]]))))
        right += int(logits.argmax()) == row["label"]
    return sum(losses) / len(losses), right / len(losses)


def test_evaluation_before_and_after(trained_place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, report = surgery.train(
        trained_place / "classifier",
        trained_place / "bert",
        trained_place / "classes.jsonl",
        trained_place / "others.jsonl",
        out,
        **QUICK,
    )
    assert report.evaluated_on == "eval_data"
    for adapter, found in ((trained_place / "classifier", report.before), (out, report.after)):
        loss, accuracy = naive_scores(adapter, trained_place)
        assert found.items == 10 and found.score == "accuracy"
        assert found.loss == pytest.approx(loss, rel=1e-5) and found.value == pytest.approx(accuracy)
    assert report.before.loss != report.after.loss


def test_perplexity_is_a_mean_over_tokens(trained_place: Path) -> None:
    _, report = surgery.train(
        trained_place / "giva", trained_place / "llama", trained_place / "texts.jsonl", **{**QUICK, "batch_size": 5}
    )
    assert report.before.value == pytest.approx(math.exp(report.before.loss), rel=1e-5)
    tokens = sum(
        len(json.loads(line)["text"].split()) - 1 for line in (trained_place / "texts.jsonl").read_text().splitlines()
    )
    assert report.before.items == tokens
