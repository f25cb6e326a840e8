"""Outputs that are inputs, places that may not be written, and inputs that change while they are read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.models.base_model import BaseModel
from surgery.storage import safetensors_read as tensor_files
from tests.helpers.command_line import contents, invoke
from tests.security.conftest import Folders

WEIGHTS = "adapter_model.safetensors"
SINGLE = "model.safetensors"


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize(
    "name", ["init", "convert", "convert the base", "merge", "merge the base", "train", "train the base"]
)
def test_output_that_is_an_input(name: str, link: bool, folders: Folders) -> None:
    """Also by another name, and with leave to replace it."""
    command, _, base = name.partition(" ")
    is_model = base or command == "init"
    out = folders.model if is_model else folders.lora
    if link:
        (folders.root / "by-link").symlink_to(folders.root)
        out = folders.root / "by-link" / out.name
    arguments = [*folders.commands()[command]]
    arguments[arguments.index("-o") + 1] = out
    before = contents(folders.root)
    result = invoke(*arguments, "--force")
    assert result.exit_code == 1 and str(out) in result.stderr
    assert contents(folders.root) == before


@pytest.mark.parametrize(
    ("name", "flag", "target"),
    [
        ("convert on data", "--stats", f"lora/{WEIGHTS}"),
        ("convert on data", "--stats", f"model/{SINGLE}"),
        ("convert on data", "--stats", "lora"),
        ("inspect", "--plot", "lora"),
        ("inspect", "--plot", f"lora/{WEIGHTS}"),
    ],
)
def test_file_that_is_an_input(name: str, flag: str, target: str, folders: Folders) -> None:
    before = contents(folders.root)
    result = invoke(*folders.commands()[name], flag, folders.root / target)
    assert result.exit_code == 1 and result.stderr.startswith("Error: ")
    assert contents(folders.root) == before


def replaced(path: Path) -> None:
    """Another file of the same name and size."""
    tensors = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(tensors, path.with_name("new"), metadata={"format": "pt"})
    path.with_name("new").replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def written_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(os.urandom(64))


@pytest.mark.parametrize("change", [replaced, cut, written_over, Path.unlink])
@pytest.mark.parametrize("name", ["init", "convert", "merge"])
def test_base_that_changes_between_two_tensors(
    name: str,
    change: Callable[[Path], None],
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HiRA, whose change is a multiple of the base weights, so that a conversion reads them."""
    if name == "convert":
        make_hira(folders)
    read, calls = tensor_files.read_tensor, []

    def changing(path: Path, tensor: str) -> torch.Tensor:
        found = read(path, tensor).clone()  # what is mapped would go with the file
        calls.append(tensor)
        if len(calls) == 2:
            change(folders.model / SINGLE)
        return found

    monkeypatch.setattr(tensor_files, "read_tensor", changing)
    result = invoke(*folders.commands()[name])
    assert len(calls) >= 2
    assert result.exit_code == 1
    assert f"{folders.model / SINGLE}: has changed while it was read" in result.stderr
    assert not folders.out.exists()


def make_hira(folders: Folders) -> None:
    import peft

    from tests.helpers.models import load_base

    shutil.rmtree(folders.lora)
    model: Any = peft.get_peft_model(load_base(folders.model), peft.HiraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    model.save_pretrained(folders.lora)


@pytest.mark.parametrize("change", [replaced, cut, Path.unlink])
def test_base_that_changes_after_its_header_was_read(
    change: Callable[[Path], None],
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = BaseModel.open

    def changing(*args: Any, **kwargs: Any) -> Any:
        found = opened(*args, **kwargs)
        change(folders.model / SINGLE)
        return found

    monkeypatch.setattr(BaseModel, "open", changing)
    result = invoke(*folders.commands()["merge"])
    assert result.exit_code == 1 and str(folders.model / SINGLE) in result.stderr
    assert not folders.out.exists()
