"""The picture of a comparison."""

from __future__ import annotations

import os
from pathlib import Path

import peft
import pytest

import surgery
from surgery.errors import OutputError, SurgeryError
from tests.helpers.comparisons import LORA
from tests.helpers.models import load_base


def test_picture(pair, llama: Path, texts: Path, tmp_path: Path) -> None:
    target = tmp_path / "errors.png"
    found = surgery.compare(*pair, plot=target)
    assert found.out == str(target) and target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 10_000
    one = target.stat().st_size
    surgery.compare(*pair, base=llama, data=texts, latency=False, plot=target)
    assert target.stat().st_size > 1.2 * one  # two maps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "errors.png", "texts.jsonl"]


def test_picture_of_an_adapter_at_its_start(pair, llama: Path, tmp_path: Path) -> None:
    peft.get_peft_model(load_base(llama), LORA(target_modules=["q_proj"])).save_pretrained(tmp_path / "start")
    surgery.compare(tmp_path / "start", pair[0], plot=tmp_path / "start.svg")
    assert b"<svg" in (tmp_path / "start.svg").read_bytes()


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(pair, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("surgery.comparison.compare.Pair.open", lambda *args: pytest.fail("worked first"))
    for target in (tmp_path / "nowhere" / "x.png", tmp_path / "x.txt", tmp_path):
        with pytest.raises(SurgeryError):
            surgery.compare(*pair, plot=target)
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(OutputError, match="may not be written"):
        surgery.compare(*pair, plot=tmp_path / "x.png")
