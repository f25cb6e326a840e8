"""Files written in a stream are those that safetensors writes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from surgery.storage.safetensors_write import DTYPE_OF_CODE, write_tensors


def test_streamed_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {"empty": torch.zeros(0), "scalar": torch.tensor(1.5)}
    for number, dtype in enumerate(DTYPE_OF_CODE.values()):
        tensors.update({f"{name}.{number}": torch.arange(6).reshape(3, 2).to(dtype) for name in ("b", "a", "c.10")})
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    write_tensors(tmp_path / "found", tensors, {"format": "pt"})
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
