"""Members of a batch: how they are found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import surgery
from surgery.converters.adapter_folders import adapter_folders
from surgery.converters.batch_members import members_of
from surgery.errors import AdapterError, MethodError


def test_members_are_found_and_named(loras: Path, llama: Path, tmp_path: Path) -> None:
    (loras / "logs").mkdir()
    shutil.copytree(llama, loras / "base")
    assert [each.name for each in adapter_folders(loras)] == ["a", "b", "c"]
    assert adapter_folders(loras / "a") == [] and adapter_folders(Path("org/name")) == []
    other = tmp_path / "others" / "a"
    shutil.copytree(loras / "a", other)
    names = [member.name for member in members_of([loras, loras / "a", other], None)]
    assert names == ["loras-a", "b", "c", "others-a"]
    run = tmp_path / "run"
    for step in (9, 10):
        shutil.copytree(loras / "a", run / f"checkpoint-{step}")
    with pytest.raises(AdapterError, match=r"newest, .*checkpoint-10"):
        adapter_folders(run)
    with pytest.raises(MethodError, match="folder of 3 adapters: give it in a list"):
        surgery.convert(loras, "giva")
