"""Folders of adapters, and adapters in several files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import surgery
from surgery.adapters.adapter import Adapter
from surgery.errors import SurgeryError


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
