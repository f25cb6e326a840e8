"""Adapters that share a base: which base each goes to, and what is gathered once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from peft import LoraConfig

import surgery
from tests.helpers.conversions import trained
from tests.helpers.models import llama_config, load_base
from tests.helpers.texts import text_rows, write_rows


def test_members_go_to_the_base_that_they_name_or_fit(llama: Path, loras: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    transformers.LlamaForCausalLM(llama_config(hidden_size=64)).save_pretrained(wide)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trained(load_base(wide), config, loras / "w")
    for name, base in (("a", str(llama)), ("b", ""), ("c", str(llama)), ("w", "")):
        path = loras / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    report = surgery.convert([loras], "giva", ratio=2, base=[wide, llama])
    assert [entry.error for entry in report.entries] == [None] * 4
    assert [each.base for _, each in report] == [str(llama)] * 3 + [str(wide)]


def test_statistics_grow_and_a_layer_without_gradient_is_noted(
    loras: Path,
    text_llama: Path,
    tmp_path: Path,
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    trained(load_base(text_llama), config, loras / "k")
    data, stats = write_rows(tmp_path / "texts.jsonl", text_rows(40)), tmp_path / "base.stats"
    options: dict[str, Any] = {"base": text_llama, "data": data, "samples": 16, "ratio": 2, "stats": stats}
    narrow = surgery.convert(loras / "a", "giva", **options)[1]
    size = stats.stat().st_size
    both = surgery.convert([loras / "k", loras / "a"], "giva", **options)
    assert stats.stat().st_size > size and not both.failed
    assert both[1][1].output_error == narrow.output_error
    size = stats.stat().st_size
    surgery.convert([loras / "a", loras / "k"], "giva", **options)
    assert stats.stat().st_size == size
