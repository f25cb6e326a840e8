"""Calibration data: lower output errors, and statistics that serve a second adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import surgery
from tests.helpers.conversions import WEIGHTS
from tests.helpers.models import load_base
from tests.helpers.texts import text_rows, write_rows


def test_calibration_data_lowers_the_output_error(lora: Path, llama: Path, text_llama: Path, tmp_path: Path) -> None:
    """The metric's ranks lose less of the outputs than plain ones do, at the same size."""
    data = write_rows(tmp_path / "texts.jsonl", text_rows(96))
    options = {"base": text_llama, "data": data, "samples": 48, "ratio": 3.0}
    measured, report = surgery.convert(lora, "lora", tmp_path / "with", **options)
    assert report.kl is not None and report.agreement is not None and report.output_error is not None
    assert any("calibrate" in line for line in report.notes)
    plain, _ = surgery.convert(lora, "lora", tmp_path / "without", ratio=3.0)
    again, stated = surgery.convert(tmp_path / "without", "lora", None, base=text_llama, data=data, samples=48)
    assert stated.output_error == pytest.approx(0.0, abs=1e-6)
    kls = {name: surgery_kl(text_llama, lora, tmp_path / name, data) for name in ("with", "without")}
    assert kls["with"] < kls["without"]
    assert measured.tensors.keys() != plain.tensors.keys() or again is not plain


def surgery_kl(base: Path, reference: Path, other: Path, data: Path) -> float:
    """The KL divergence by PEFT alone, on the same texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()][:32]
    total = 0.0
    models = [PeftModel.from_pretrained(load_base(base), folder).eval() for folder in (reference, other)]
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in models)
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(texts)


@pytest.mark.parametrize(("to", "options"), [("giva", {"ratio": 30.0}), ("lora", {"rank": 2})])
def test_recovery_learns_the_answers_again_in_no_more_bytes(to, options, lora, text_llama, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "texts.jsonl", text_rows(96))
    options = {**options, "base": text_llama, "data": data, "samples": 48}
    _, before = surgery.convert(lora, to, tmp_path / "before", **options)
    adapter, after = surgery.convert(lora, to, tmp_path / "after", recover=60, **options)
    assert after.kl < 0.9 * before.kl and after.bytes <= before.bytes
    assert (tmp_path / "after" / WEIGHTS).stat().st_size == after.bytes
    assert adapter.provenance["options"]["recover"] == 60 and adapter.provenance["report"]["kl"] == after.kl
    assert surgery_kl(text_llama, lora, tmp_path / "after", data) < surgery_kl(
        text_llama, lora, tmp_path / "before", data
    )


def test_statistics_of_a_base_serve_a_second_adapter(lora: Path, text_llama: Path, tmp_path: Path, monkeypatch) -> None:
    data, stats = write_rows(tmp_path / "texts.jsonl", text_rows(40)), tmp_path / "stats.safetensors"
    surgery.convert(lora, "lora", tmp_path / "a", base=text_llama, data=data, samples=16, stats=stats, ratio=2)
    assert stats.is_file()
    assert not list(tmp_path.glob(".surgery-*"))
    _, again = surgery.convert(lora, "lora", base=text_llama, data=data, samples=16, stats=stats, ratio=2)
    assert any("those of" in note and "16 samples measure" in note for note in again.notes)
    assert not any("calibrate" in note for note in again.notes)
    monkeypatch.setattr("surgery.converters.shared_base.load_model", lambda *args: pytest.fail("the model was loaded"))
    _, report = surgery.convert(lora, "lora", tmp_path / "b", base=text_llama, stats=stats, ratio=2)
    assert report.output_error is not None
    assert surgery.Adapter.open(tmp_path / "a").tensors.keys() == surgery.Adapter.open(tmp_path / "b").tensors.keys()
