"""Folders of adapters, and adapters in several files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from surgery.adapters.adapter import Adapter, bits_equal
from surgery.errors import SurgeryError
from tests.helpers.models import load_base, model_inputs, output, save_model
from tests.helpers.stock_adapters import randomise


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inner")
    base = save_model("llama", folder / "base")
    model = get_peft_model(load_base(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model)
    model.save_pretrained(folder / "lora")
    return base, folder / "lora"


def test_the_one_adapter_inside_is_opened(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "run" / "mine")
    (tmp_path / "run" / "README.md").write_text("a run")
    assert Adapter.open(tmp_path / "run").name == "mine"
    assert surgery.merge(tmp_path / "run", pair[0], dry_run=True).modules == 3
    assert surgery.push(tmp_path / "run", "a/b", base_model="o/b", dry_run=True).modules == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["checkpoint-9", "checkpoint-10"], r"holds 2 folders .*checkpoint-10 is the newest"),
        (["checkpoint-9"], r"checkpoint-9 is the newest"),
        (["one", "two"], r"holds 2 adapters \(one, two\); give one of them"),
    ],
)
def test_which_one_is_not_guessed(pair: tuple[Path, Path], tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        shutil.copytree(pair[1], tmp_path / "run" / name)
    for verb in (surgery.inspect, lambda folder: surgery.load(folder, pair[0])):
        with pytest.raises(SurgeryError, match=message):
            verb(tmp_path / "run")


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
