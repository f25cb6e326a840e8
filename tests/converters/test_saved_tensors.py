"""Tensors that are saved whole are carried bit for bit, and counted apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import surgery
from tests.helpers.conversions import WEIGHTS, head_bytes, trained
from tests.helpers.models import (
    build,
    load_base,
    spread,
)
from tests.helpers.texts import save_tokenizer, text_rows, write_rows


def test_a_head_is_carried_bit_for_bit(model_folder, tmp_path: Path) -> None:
    import transformers

    base = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=5)
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    trained(base, config, tmp_path / "source")
    for to in ("lora", "giva"):
        surgery.convert(tmp_path / "source", to, tmp_path / to, ratio=1.2, **({"bits": 16} if to == "giva" else {}))
        for name in ("weight", "bias"):
            key = f"base_model.model.classifier.{name}"
            found, wanted = (load_file(tmp_path / folder / WEIGHTS)[key] for folder in (to, "source"))
            assert torch.equal(found, wanted)


def test_a_head_of_another_number_of_labels_than_the_bases_own_is_measured(tmp_path: Path) -> None:
    config = build("bert").config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(1)
    own = transformers.BertForSequenceClassification(config)
    spread(own)
    own.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", text_rows(24))
    adapters = []
    for labels in (5, 3, 7):
        model = transformers.BertForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True
        )
        settings = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
        adapters.append(trained(model, settings, tmp_path / str(labels)))
    pairs = surgery.convert(adapters, "lora", tmp_path / "out", base=tmp_path / "base", data=data, samples=12)
    assert all(report.agreement == 1 and report.kl < 1e-10 for _, report in pairs)
    cut = surgery.convert(adapters[0], "lora", base=tmp_path / "base", data=data, samples=12, rank=1)[1]
    assert cut.kl is not None and cut.kl > 1e-8


def test_ratio_counts_factors_and_shows_the_head_apart(headed: Path, tmp_path: Path) -> None:
    head, size = head_bytes(headed), (headed / WEIGHTS).stat().st_size
    assert head > 0.7 * size
    _, report = surgery.convert(headed, "giva", tmp_path / "out", ratio=4)
    written = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert (size - head) / 4.6 < written - head <= (size - head) / 4 + 200
    assert report.ratio == pytest.approx(4, rel=0.1) and report.saved_modules == ["score"]
    assert head < report.saved_bytes < head + 300
    assert any("--ratio counts the factors" in note for note in report.notes)
    assert report.source_bytes_bf16 == size - (size - head - (size - head) % 4) // 2 or report.source_bytes_bf16 < size


def test_what_is_the_bases_own_is_not_carried(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    trained(load_base(llama), config, tmp_path / "source")
    name = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(tmp_path / "source" / WEIGHTS)
    tensors.setdefault(name, load_base(llama).lm_head.weight.detach().clone())
    save_file(tensors, tmp_path / "source" / WEIGHTS, metadata={"format": "pt"})
    made, report = surgery.convert(tmp_path / "source", "lora", base=llama)
    assert name not in made.tensors and any(name in note for note in report.notes)
    assert name in surgery.convert(tmp_path / "source", "lora")[0].tensors  # without a base it is not known
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "source" / WEIGHTS, metadata={"format": "pt"})
    assert name in surgery.convert(tmp_path / "source", "lora", base=llama)[0].tensors
