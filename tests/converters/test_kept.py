"""What a result keeps: shares of the divergence or the cosine, and the smallest size that keeps enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

import surgery
from surgery.converters.budget import Budget
from surgery.converters.kept import smallest_keeping
from surgery.converters.report import ConvertReport
from tests.helpers.conversions import WEIGHTS, trained
from tests.helpers.models import load_base
from tests.helpers.texts import save_tokenizer, text_rows, write_rows


def test_with_data_kept_is_a_share_of_the_divergence(
    lora: Path,
    text_llama: Path,
    tmp_path: Path,
) -> None:
    data = write_rows(tmp_path / "texts.jsonl", text_rows(48))
    _, report = surgery.convert(lora, "giva", base=text_llama, data=data, samples=24, ratio=8)
    tensors = load_file(lora / WEIGHTS)
    zero = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    nothing = surgery.Adapter(surgery.Adapter.open(lora).config, zero)
    whole = surgery.compare(lora, nothing, base=text_llama, data=data, samples=48, latency=False).kl
    assert report.kl is not None and whole is not None and report.perplexity is not None
    # Half of the samples that `compare` sees are held out here.
    assert 1 - report.kept == pytest.approx(report.kl / whole, rel=0.5) and report.kept > 0.5


def test_a_bare_encoder_reports_its_cosine(model_folder: Any, tmp_path: Path) -> None:
    folder = save_tokenizer(model_folder("bert"))
    config = LoraConfig(r=4, target_modules=["query", "pooler.dense"])
    trained(load_base(folder), config, tmp_path / "source")
    data = write_rows(tmp_path / "texts.jsonl", text_rows(32))
    _, report = surgery.convert(tmp_path / "source", "giva", base=folder, data=data, samples=16, ratio=3)
    assert report.kl is None and report.cosine is not None and report.cosine > 0.9
    assert any("no gradient reaches" in note and "pooler.dense" in note for note in report.notes)
    sites = {site.module: site for site in report.sites}
    assert sites["pooler.dense"].output_error is None and sites["pooler.dense"].weight_error < 0.9


def test_a_form_that_cannot_hold_so_much_has_no_size_worth_having() -> None:
    class Made:
        def __init__(self, budget: Budget) -> None:
            size = budget.size or 1000
            self.report = ConvertReport(None, "x", "X", "s", "LORA", 1, 1, min(size, 1000), 4000, 4.0, 0.6, kept=0.64)

    assert smallest_keeping(0.9, Made) is None
