"""JSON files are read within limits, and written the same whatever the order of the keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgery.errors import CheckpointError
from surgery.storage.json_files import DEEPEST, read_json, read_text, write_json


def test_written_in_one_way_and_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None], "a": "é"})
    write_json(tmp_path / "b.json", {"a": "é", "b": [1, 2.5, None]})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": "é", "b": [1, 2.5, None]}


@pytest.mark.parametrize("depth", [DEEPEST - 1, DEEPEST + 1])
def test_nesting_has_an_end(depth: int, tmp_path: Path) -> None:
    value: object = 1
    for _ in range(depth):
        value = [value]
    path = tmp_path / "deep.json"
    path.write_text(json.dumps({"a": value}))
    if depth < DEEPEST:
        assert read_json(path) == {"a": value}
        return
    with pytest.raises(CheckpointError, match=f"deep.json: is nested more than {DEEPEST} deep"):
        read_json(path)


@pytest.mark.parametrize("data", [b"{", b"\xff", b"1" * 5000, b"[" * 100_000])
def test_what_is_no_json_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.json: cannot be read as JSON"):
        read_json(tmp_path / "x.json")


def test_folders_and_lists_are_no_objects(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder, expected a file"):
        read_json(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found list"):
        read_json(tmp_path / "list.json")
    (tmp_path / "text").write_bytes(b"a\xffb")
    assert read_text(tmp_path / "text") == "a\ufffdb"
