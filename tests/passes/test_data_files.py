"""Rows of data files, with and without the package `datasets`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from surgery.errors import DataError
from surgery.passes.data_files import read_rows

ROWS = [{"text": "a, b", "label": 1}, {"text": 'say "c"', "label": 0}, {"text": "d", "label": 1}]


@pytest.fixture(autouse=True)
def no_datasets(monkeypatch) -> None:
    """The package is not installed."""
    monkeypatch.setitem(sys.modules, "datasets", None)


def rows_of(path: Path, **options: bool) -> list[dict]:
    return list(read_rows(path, wants_images=False).drawn(None, 0))


def written(place: Path, name: str) -> Path:
    path = place / name
    if name.endswith(".csv"):
        path.write_text('text,label,other\n"a, b",1,x\n"say ""c""",0,y\nd,1,z\n')
    elif name == "list.json":
        path.write_text(json.dumps(ROWS))
    elif name == "columns.json":
        path.write_text(json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}))
    else:
        mark = "\ufeff" if name == "bom.jsonl" else ""
        path.write_text(mark + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.csv", "list.json", "columns.json", "lines.json", "a.jsonl", "bom.jsonl"])
def test_formats_of_the_core(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name)
    assert rows_of(path) == ROWS
    found = read_rows(path, wants_images=False)
    assert found.labels() == [1, 0] and found.columns[:2] == ["text", "label"]


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo words \r\n")
    assert rows_of(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two words "}]


@pytest.mark.parametrize(
    ("cells", "labels"),
    [("1 0", [1, 0]), ("0.5 2", [0.5, 2.0]), ("True false", [True, False]), ("cat 3", ["cat", "3"])],
)
def test_labels_of_a_csv_have_a_type(cells: str, labels: list, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"5,{cell}\n" for cell in cells.split()))
    assert rows_of(tmp_path / "a.csv") == [{"text": "5", "label": label} for label in labels]


def test_missing_columns_are_none_and_rows_are_drawn_as_by_datasets(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)} if i % 2 else {"prompt": str(i)}) + "\n" for i in range(9)))
    drawn = [row["text"] or row["prompt"] for row in read_rows(path, wants_images=False).drawn(4, seed=3)]
    # numpy.random.default_rng(3).permutation(9), which datasets' shuffle draws
    assert drawn == ["7", "0", "2", "1"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"text": 1}\n{nope\n', "line 2: Expecting property name"),
        ("a.jsonl", "[1]\n", "row 1 is list, not an object"),
        ("a.json", '[{"text": "a"}, 3]', "row 2 is int"),
        ("a.csv", "text,label\na,1,2\n", "line 2 has more cells than the header"),
        ("a.csv", "text,label\n", "is empty"),
        ("a.txt", " \n", "is empty"),
    ],
)
def test_broken_files(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_rows(tmp_path / name, wants_images=False)


def test_bad_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="cannot be read as json"):
        read_rows(tmp_path / "a.jsonl", wants_images=False)


def test_parquet_and_images_name_the_extra(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "images").mkdir()
    for path, images in ((tmp_path / "a.parquet", False), (tmp_path / "images", True)):
        with pytest.raises(DataError, match=r"needs the package datasets: pip install 'adapter-surgery\[train\]'"):
            read_rows(path, wants_images=images)
