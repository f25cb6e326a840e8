"""Results on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from surgery.cli import streams
from surgery.cli.progress import aside_from_bars, progress_bar
from surgery.display import tables
from surgery.system.text import human_bytes

__all__ = [
    "aside_from_bars",
    "load_line",
    "note",
    "printable",
    "progress_bar",
    "show",
    "show_json",
    "summary",
    "table",
    "written",
]


def show(text: str, err: bool = False) -> None:
    """Print a result on stdout, or on stderr; names from files cannot steer the terminal."""
    streams.write(printable(text), err)


def show_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    streams.write(json.dumps(value))


def written(out: str | None, size: int) -> str:
    """What --quiet prints of an output: where it is, or after a dry run how large it would be."""
    return out if out is not None else human_bytes(size)


def load_line(out: str) -> str:
    """Return the line that says how an adapter which was written is opened, whatever its type is."""
    return f'Load it:  import surgery; PeftModel.from_pretrained(base, "{out}")'


def note(text: str) -> None:
    """Print a line on stderr."""
    show(text, err=True)


def printable(text: str) -> str:
    """A text in which every character that is not shown, but does something, is written as its number."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table that fits the terminal, or of any width where the output goes to a file or a program."""
    return tables.table(header, rows, right, _width())


def summary(pairs: Sequence[tuple[str, str]]) -> str:
    """Labels and values, likewise."""
    return tables.summary(pairs, _width())


def _width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
