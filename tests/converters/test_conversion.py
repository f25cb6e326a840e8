"""One conversion: its default size, notes on what is lost, and sizes that keep enough."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MethodError
from surgery.system.text import parse_bytes
from tests.helpers.conversions import WEIGHTS


def test_the_default_gives_way_where_it_keeps_too_little(lora: Path) -> None:
    draws, tensors = torch.Generator().manual_seed(0), load_file(lora / WEIGHTS)
    flat = {name: torch.randn(tensor.shape, generator=draws) for name, tensor in tensors.items()}
    save_file(flat, lora / WEIGHTS, metadata={"format": "pt"})
    _, report = surgery.convert(lora, "giva")
    _, twentieth = surgery.convert(lora, "giva", ratio=20, accept_loss=True)
    assert twentieth.kept < 0.8 and report.kept >= 0.9
    assert report.notes[0].startswith("the default, --ratio 20, keeps ")
    size = re.search(r"--size ([\d.]+KiB)", report.notes[0])
    assert size is not None and report.bytes <= parse_bytes(size[1])
    # It is the smallest: a tenth less keeps less.
    assert surgery.convert(lora, "giva", size=int(report.bytes * 0.88), accept_loss=True)[1].kept < 0.9


@pytest.mark.parametrize("to", ["giva", "lora", "vera"])
@pytest.mark.parametrize("budget", [{"size": 300}, {"size": "1KiB"}, {"ratio": 120}, {"rank": 1}])
def test_a_refusal_names_a_size_that_keeps_ninety_percent(
    to: str,
    budget: dict[str, Any],
    lora: Path,
    tmp_path: Path,
) -> None:
    try:
        _, report = surgery.convert(lora, to, tmp_path / "out", **budget)
    except MethodError as error:
        message = str(error)
    else:
        assert report.kept >= 0.5 and budget != {"size": 300}
        return
    assert message.startswith("source: ") and not (tmp_path / "out").exists()
    size = re.findall(r"--size ([\d.]+KiB)", message)[-1]
    _, report = surgery.convert(lora, to, tmp_path / "out", size=size)
    assert report.kept >= 0.9 and report.bytes <= parse_bytes(size)
    assert report.kept == pytest.approx(1 - report.weight_error**2)


def test_little_is_noted_with_the_option_that_helps(lora: Path) -> None:
    _, report = surgery.convert(lora, "lora", max_error=0.6)
    assert 0.5 < report.kept < 0.8
    assert any("--ratio" in note and "--base" in note for note in report.notes)
