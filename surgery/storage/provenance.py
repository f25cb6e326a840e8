"""The history that `surgery.json` keeps beside an output: which command made it, of which version, with what."""

from __future__ import annotations

from typing import Any

from surgery.storage.format_version import FIRST_VERSION
from surgery.version import __version__

__all__ = ["provenance_of"]


def provenance_of(command: str, format_version: int = FIRST_VERSION, **facts: Any) -> dict[str, Any]:
    """Return what `surgery.json` says of an output. It names no path of the machine.

    Args:
        command: the verb that made it.
        format_version: the version of the layout of its files.
        facts: what the verb adds.
    """
    return {"format_version": format_version, "tool": "surgery", "version": __version__, "command": command, **facts}
