"""Rows of data files: `.jsonl`, `.json`, `.txt` and `.csv` by ourselves, `.parquet` and images by `datasets`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import DataError, listing
from surgery.system.extras import extra_package

__all__ = ["Rows", "read_rows"]

Row = dict[str, Any]
READERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}
# Columns that some task reads; others are dropped, which may be large.
COLUMNS = ("text", "text_pair", "label", "prompt", "completion", "messages", "tools", "image")


class Rows:
    """The rows of a data file.

    Args:
        rows: a sequence of dictionaries, each with all of the columns.
        columns: the names of all columns in the file, those that no task reads included.
        label_names: what the numbers in the column `label` stand for, where the file says.
    """

    def __init__(self, rows: Sequence[Row] | Any, columns: Sequence[str], label_names: Sequence[str] | None) -> None:
        self.columns = list(columns)
        self.label_names = list(label_names) if label_names else None
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def drawn(self, count: int | None, seed: int) -> Iterator[Row]:
        """Yield `count` rows drawn by the seed, all where there are fewer; None yields all in the file's order."""
        order = range(len(self)) if count is None else np.random.default_rng(seed).permutation(len(self))[:count]
        for index in order:
            yield self._rows[int(index)]

    def labels(self) -> list[Any]:
        """Return the different values of the column `label`, in the order in which they occur."""
        if "label" not in self.columns:
            return []
        values = self._rows.unique("label") if hasattr(self._rows, "unique") else (row["label"] for row in self._rows)
        return list(dict.fromkeys(values))


def read_rows(path: Path, wants_images: bool) -> Rows:
    """Read a data file.

    Args:
        path: the file; for images also a folder of folders, one for each class.
        wants_images: whether the task reads images.

    Raises:
        DataError: there is no such file, it is empty, cannot be read, or is of a kind that is not read here.
    """
    kind = READERS.get(path.suffix.lower())
    if not (path.is_dir() and wants_images) and (kind is None or not path.is_file()):
        if not path.exists():
            raise DataError(f"{path}: no such data file")
        folder = " or a folder of image folders" if wants_images else ""
        raise DataError(f"{path}: data is read from {', '.join(READERS)} files{folder}")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path}: is empty")
    by_datasets = path.is_dir() or kind == "parquet"
    rows = _by_datasets(path) if by_datasets else _by_ourselves(path, str(kind))
    if len(rows) == 0:
        raise DataError(f"{path}: is empty")
    return rows


def _by_ourselves(path: Path, kind: str) -> Rows:
    readers = {"json": _json_rows, "text": _text_rows, "csv": _csv_rows}
    try:
        found = readers[kind](path)
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise DataError(f"{path}: cannot be read as {kind} ({str(error)[:200]})") from None
    columns = list(dict.fromkeys(name for row in found for name in row))
    kept = [name for name in columns if name in COLUMNS]
    return Rows([{name: row.get(name) for name in kept} for row in found], columns, None)


def _text_rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig") as file:
        return [{"text": line.rstrip("\r\n")} for line in file if line.strip()]


def _json_rows(path: Path) -> list[Row]:
    """Read JSON lines, or a `.json` file that is one list of objects or one object of columns."""
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError:
            pass  # several objects: read line by line
        else:
            return [_object(row, index) for index, row in enumerate(_listed(whole), 1)]
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}") from None
            rows.append(_object(value, number))
    return rows


def _listed(whole: Any) -> list[Any]:
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else [whole]
    columns = list(whole.values())
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(whole, values, strict=True)) for values in zip(*columns, strict=True)]
    return [whole]


def _object(value: Any, number: int) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"row {number} is {type(value).__name__}, not an object with columns")
    return value


def _csv_rows(path: Path) -> list[Row]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows: list[Row] = []
        for row in reader:
            if None in row:
                raise ValueError(
                    f"line {reader.line_num} has more cells than the header ({listing(reader.fieldnames or ())})"
                )
            rows.append({name: value or None for name, value in row.items()})
    if rows and "label" in rows[0]:
        for row, label in zip(rows, _typed([row["label"] for row in rows]), strict=True):
            row["label"] = label
    return rows


def _typed(cells: list[str | None]) -> list[Any]:
    """Return cells as whole numbers, numbers or truth values where all of them are, else as they are."""
    truth = {"true": True, "false": False}
    for convert in (int, float, lambda cell: truth[cell.lower()]):
        try:
            return [None if cell is None else convert(cell) for cell in cells]
        except (KeyError, ValueError):
            continue
    return list(cells)


def _by_datasets(path: Path) -> Rows:
    what = f"{path}: a folder of images" if path.is_dir() else f"{path}: a parquet file"
    datasets = extra_package("datasets", what, DataError)
    datasets.disable_progress_bars()
    if path.is_dir():
        extra_package("PIL.Image", what, DataError)
        kind, where = "imagefolder", {"data_dir": str(path)}
    else:
        kind, where = "parquet", {"data_files": str(path)}
    try:
        rows = datasets.load_dataset(kind, split="train", **where)
    except Exception as error:  # of many kinds, from the readers of the formats
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        if "corresponds to no data" in reason:
            raise DataError(f"{path}: is empty") from None
        raise DataError(f"{path}: cannot be read as {kind} ({reason[:200]})") from None
    names = getattr(rows.features.get("label"), "names", None)
    return Rows(rows, rows.column_names, names)
