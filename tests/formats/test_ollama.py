"""Ollama's Modelfile."""

from __future__ import annotations

from pathlib import Path

import surgery
from tests.helpers.adapters import make_adapter
from tests.helpers.exports import gguf_lora


def test_ollamas_modelfile(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "lora", gguf_lora(["q_proj"]))
    report = surgery.export(folder, "ollama", tmp_path / "out", base=llama)
    assert (tmp_path / "out" / "Modelfile").read_text().endswith("ADAPTER ./adapter.gguf\n")
    assert report.commands[0].startswith("ollama create out -f")
