"""PEFT's layout with the tensors in several files, which an index names: some trainers write large adapters so."""

from __future__ import annotations

from pathlib import Path

import torch

from surgery.adapters.format_registry import AdapterParts, Format
from surgery.adapters.names import CONFIG_FILE, WEIGHTS_FILE
from surgery.formats.peft import peft_parts
from surgery.storage.safetensors_read import files_from_index, read_tensors

__all__ = ["SHARDED"]

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


class ShardedFormat(Format):
    """An adapter in several safetensors files; what is written from it is one file."""

    title = "PEFT, in several files"

    def recognises(self, folder: Path) -> bool:
        files = folder / CONFIG_FILE, folder / INDEX_FILE
        return all(path.is_file() for path in files) and not (folder / WEIGHTS_FILE).is_file()

    def read(self, folder: Path) -> AdapterParts:
        parts = peft_parts(folder, lambda: _tensors(folder / INDEX_FILE))
        parts.weights = folder / INDEX_FILE
        parts.notes.append("its tensors are in several files; what is written is one")
        return parts


def _tensors(index: Path) -> dict[str, torch.Tensor]:
    files = files_from_index(index)
    found: dict[str, torch.Tensor] = {}
    for path in sorted(set(files.values())):
        found.update({name: tensor for name, tensor in read_tensors(path).items() if files.get(name) == path})
    return {name: found[name] for name in files if name in found}


SHARDED = ShardedFormat()
