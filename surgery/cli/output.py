"""Results on stdout, progress and notes on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

__all__ = ["note", "progress_bar", "show_json"]


def show_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(value))


def note(text: str) -> None:
    """Print a line on stderr."""
    click.echo(text, err=True)


@contextlib.contextmanager
def progress_bar(label: str, wanted: bool, unit: str = "weight") -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar on stderr, on a terminal only; gives the callback that moves it."""
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=label, unit=unit, leave=False, file=sys.stderr) as bar:

        def move(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)

        yield move
