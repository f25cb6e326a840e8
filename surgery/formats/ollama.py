"""Ollama: llama.cpp's GGUF adapter, and the Modelfile that puts it on its base."""

from __future__ import annotations

from pathlib import Path

from surgery.adapters.format_registry import AdapterParts
from surgery.formats.gguf import GGUF_FILE, GgufFormat
from surgery.formats.server import base_name

__all__ = ["MODELFILE", "OLLAMA"]

MODELFILE = "Modelfile"


class OllamaFormat(GgufFormat):
    """Adapters for Ollama."""

    title = "Ollama"

    def recognises(self, folder: Path) -> bool:
        return False  # it is llama.cpp's file

    def write(self, parts: AdapterParts, folder: Path, label: str) -> int:
        lines = [
            "# FROM names the base model as Ollama has it, or the path of its GGUF file.",
            f"FROM {base_name(parts)}",
            f"ADAPTER ./{GGUF_FILE}",
        ]
        (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return super().write(parts, folder, label)

    def commands(self, parts: AdapterParts, out: str) -> list[str]:
        name = Path(out).name
        return [f"ollama create {name} -f {out}/{MODELFILE}", f"ollama run {name}"]

    def notes(self, parts: AdapterParts) -> list[str]:
        return [
            f"{MODELFILE} says FROM {base_name(parts)}: put there what Ollama calls the base model, or its GGUF file"
        ]


OLLAMA = OllamaFormat()
