"""An adapter in several files is the whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.adapters.adapter import Adapter, bits_equal
from surgery.errors import SurgeryError
from tests.helpers.models import model_inputs, output


def test_an_adapter_in_several_files_is_the_whole(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = pair
    sharded = shutil.copytree(lora, tmp_path / "sharded")
    tensors = load_file(sharded / "adapter_model.safetensors")
    (sharded / "adapter_model.safetensors").unlink()
    files = {name: f"adapter_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, sharded / file, {"format": "pt"})
    (sharded / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    read, whole = Adapter.open(sharded), Adapter.open(lora)
    assert read.tensors.keys() == whole.tensors.keys()
    assert all(bits_equal(read.tensors[name], whole.tensors[name]) for name in whole.tensors)
    want = output(surgery.load(lora, base), model_inputs("llama"))
    assert torch.equal(output(surgery.load(sharded, base), model_inputs("llama")), want)
    surgery.inspect(sharded)
    surgery.convert(sharded, to="lora", out=tmp_path / "one")
    assert (tmp_path / "one" / "adapter_model.safetensors").is_file()
    with pytest.raises(SurgeryError, match="surgery convert"):
        surgery.push(sharded, "a/b", base_model="o/b", dry_run=True)
