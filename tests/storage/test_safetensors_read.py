"""The files of a checkpoint: sizes that are told before writing, files that change, names and texts that are none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from surgery.adapters.adapter import Adapter
from surgery.errors import AdapterError, CheckpointError
from surgery.storage.json_files import read_text
from surgery.storage.safetensors_read import TensorFiles, file_bytes
from surgery.storage.safetensors_write import DTYPE_OF_CODE

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize("seed", range(20))
def test_the_size_of_a_file_is_told_before_it_is_written(seed: int, tmp_path: Path) -> None:
    """Of several dtypes of one width too: their order decides how many digits the offsets have."""
    drawn, dtypes = torch.Generator().manual_seed(seed), list(DTYPE_OF_CODE.values())

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=drawn))

    tensors = {
        f"{'äb'[number(2)]}.{index}": torch.zeros([0, 1, 3, 10, 100, 1000][number(6)]).to(dtypes[number(len(dtypes))])
        for index in range(1 + number(30))
    }
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    assert file_bytes(tensors) == (tmp_path / SINGLE).stat().st_size
    assert file_bytes({name: tensor.to("meta") for name, tensor in tensors.items()}) == file_bytes(tensors)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch knows no 4-bit floats")
def test_what_cannot_be_computed_with_is_refused_by_name(tmp_path: Path) -> None:
    """4-bit floats, two to a byte: torch reads them and knows no operation on them."""
    four = torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file({"a": torch.ones(2), "b": four}, tmp_path / SINGLE)
    files = TensorFiles.open(tmp_path)
    assert float(files.read("a").sum()) == 2
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor b is float4_e2m1fn_x2, .* bfloat16"):
        files.read("b")
    (tmp_path / SINGLE).rename(tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="tensor b is float4_e2m1fn_x2"):
        Adapter.open(tmp_path)


def test_a_file_that_is_written_over_is_not_read(tmp_path: Path) -> None:
    """In place, with the size and the time of the old one."""
    save_file({"a": torch.zeros(4)}, tmp_path / SINGLE)
    save_file({"a": torch.ones(4)}, tmp_path / "other")
    files = TensorFiles.open(tmp_path)
    assert float(files.read("a").sum()) == 0
    status = (tmp_path / SINGLE).stat()
    (tmp_path / SINGLE).write_bytes((tmp_path / "other").read_bytes())
    os.utime(tmp_path / SINGLE, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = (tmp_path / SINGLE).stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (status.st_ino, status.st_size, status.st_mtime_ns)
    for act in (lambda: files.read("a"), files.check_unchanged):
        with pytest.raises(CheckpointError, match="has changed while it was read"):
            act()


@pytest.mark.parametrize("name", ["x" * 300, "nul\0", "."])
def test_an_index_of_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=INDEX):
        TensorFiles.open(tmp_path)


def test_a_text_for_people_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("short")
    assert read_text(path) == "short"
    os.truncate(path, 1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(CheckpointError, match=r"README.md: has \d+ bytes"):
        read_text(path)
