"""Which folders stand for the adapters in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.converters.adapter_folders import adapter_folders
from surgery.errors import AdapterError


def folder_with(place: Path, *files: str) -> Path:
    for file in files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).touch()
    return place


def test_whole_and_broken_adapters_are_found_and_nothing_else(tmp_path: Path) -> None:
    files = (
        "b/adapter_config.json",
        "a/adapter_model.safetensors",
        "m/adapters.safetensors",
        "logs/x.txt",
        "notes.txt",
    )
    folder = folder_with(tmp_path, *files, ".hidden/adapter_config.json")
    assert [each.name for each in adapter_folders(folder)] == ["a", "b", "m"]


@pytest.mark.parametrize("own", ["adapter_config.json", "config.json"])
def test_an_adapter_or_a_model_stands_for_itself(own: str, tmp_path: Path) -> None:
    assert adapter_folders(folder_with(tmp_path, own, "a/adapter_config.json")) == []
    assert adapter_folders(tmp_path / "absent") == []


def test_checkpoints_of_one_run_are_no_batch(tmp_path: Path) -> None:
    folder_with(tmp_path, *(f"checkpoint-{step}/adapter_config.json" for step in (9, 10)))
    with pytest.raises(AdapterError, match=r"newest, .*checkpoint-10"):
        adapter_folders(tmp_path)
    folder_with(tmp_path, "final/adapter_config.json")
    assert len(adapter_folders(tmp_path)) == 3
