"""What must not leave the machine: tokens, and paths of its disk."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.errors import HubError
from surgery.system.redaction import TOKEN, redacted

__all__ = ["machine_folders", "quiet_logs", "refuse_private", "without_paths"]

# Two components at least: a single slash or </b> is no path. What follows a colon or a slash belongs to a URL.
ABSOLUTE = re.compile(r"(?<![\w.:/<\\-])(?:~/|/)(?:[\w.+@~=-]+/)+[\w.+@~=-]*|\b[A-Za-z]:\\[^\s\"']+")
# Homes of any machine, for text that was written on another one.
HOMES = re.compile(r"(?<![\w.:/-])/(?:home|Users)/[\w.-]+/|\b[A-Za-z]:\\Users\\")
LOGGERS = ("huggingface_hub", "httpx2", "httpx", "httpcore", "httpcore2")


def without_paths(value: Any) -> Any:
    """A JSON value in which every absolute path is replaced by its last component."""
    if isinstance(value, dict):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    whole = value.removeprefix("file://")
    if len(Path(whole).parts) > 2 and Path(whole).is_absolute() and "\n" not in whole:
        return Path(whole).name
    return ABSOLUTE.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], value)


def machine_folders(folder: Path) -> list[str]:
    """The folders whose names would tell about this machine: home, the working directory, and where an adapter lies."""
    known = [Path.home(), Path.cwd(), folder.resolve(), folder.absolute().parent]
    return sorted({str(path) for path in known if len(path.parts) > 1}, key=len, reverse=True)


def refuse_private(name: str, text: str, folders: list[str], original: Path | None = None) -> None:
    """Refuse a text that holds a token or a path of this machine.

    Args:
        name: of the file, for the message.
        text: what is to be published.
        folders: `machine_folders`.
        original: the user's file, whose lines are counted.

    Raises:
        HubError: it does; the message names the line, and does not repeat a token.
    """
    paths = re.compile("|".join([*(rf"(?<![\w.:-]){re.escape(path)}(?![\w.-])" for path in folders), HOMES.pattern]))
    token, path = TOKEN.search(text), paths.search(text)
    if token is not None:
        where = _line(name, text, token.start(), original)
        raise HubError(f"{where}: holds what looks like a Hub token; take it out, and revoke it")
    if path is not None:
        where = _line(name, text, path.start(), original)
        raise HubError(f"{where}: holds a path of a machine ({path[0]}); take it out")


def _line(name: str, text: str, position: int, original: Path | None) -> str:
    """The file and, where the user's own has it, the line."""
    end = text.find("\n", position)
    line = text[text.rfind("\n", 0, position) + 1 : end if end >= 0 else None].rstrip("\r")
    if original is None or not original.is_file():
        return name
    lines = original.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"{name}, line {lines.index(line) + 1}" if line in lines else name


class _Redaction(logging.Filter):
    """Redacts what libraries log."""

    def __init__(self, token: str | None) -> None:
        super().__init__()
        self.token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage(), self.token), None
        return True


@contextlib.contextmanager
def quiet_logs(token: str | None) -> Iterator[None]:
    """While the block runs, what the Hub's client logs is redacted, and only shown under `-v`."""
    shown = logging.getLogger().isEnabledFor(logging.INFO)
    redaction = _Redaction(token)
    # A filter of a logger does not see what its children log; one of a handler does.
    handlers = [*logging.getLogger().handlers, *(h for name in LOGGERS for h in logging.getLogger(name).handlers)]
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for handler in handlers:
        handler.addFilter(redaction)
    for name in LOGGERS if not shown and not os.environ.get("HF_DEBUG") else ():
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(redaction)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
