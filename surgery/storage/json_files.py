"""JSON files: read within limits, written in one way; and text files."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, first_line

__all__ = ["read_json", "read_text", "write_json"]

# The indices of the largest models have some megabytes.
LARGEST_JSON = 1 << 28

DEEPEST = 64


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable, no file, too large, not JSON, or not an object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is a {file_kind(status.st_mode)}, expected a file")
        if status.st_size > LARGEST_JSON:
            raise CheckpointError(f"{path}: has {status.st_size} bytes, more than any configuration")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    # A value error: not UTF-8, not JSON, or a number of more digits than Python reads.
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if _is_deep(value):
        raise CheckpointError(f"{path}: is nested more than {DEEPEST} deep")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a value has more levels than what works on it, level by level, can stand."""
    left = [(value, 0)]
    while left:
        inner, depth = left.pop()
        if depth > DEEPEST:
            return True
        if isinstance(inner, (dict, list)):
            left += [(each, depth + 1) for each in (inner.values() if isinstance(inner, dict) else inner)]
    return False


def read_text(path: Path) -> str:
    """Read a text for people; what is not UTF-8 is replaced.

    Raises:
        CheckpointError: the file cannot be read, or is too large for a text.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise CheckpointError(f"{path}: has {size} bytes, more than any text for people")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, its keys in order."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def file_kind(mode: int) -> str:
    return "folder" if stat.S_ISDIR(mode) else "pipe, a socket or a device"
