"""The adapters in a folder that is no adapter itself; imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

from surgery.errors import AdapterError

__all__ = ["adapter_folders"]

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
CONFIG_FILE = "adapter_config.json"  # the module of names imports torch


def adapter_folders(folder: Path) -> list[Path]:
    """Return the adapter folders in a folder that is no adapter itself; none for any other folder, or a Hub id.

    Raises:
        AdapterError: all that it holds are checkpoints of one training run.
    """
    try:
        if not folder.is_dir() or (folder / CONFIG_FILE).exists() or (folder / "config.json").exists():
            return []
        inside = [each for each in sorted(folder.iterdir()) if not each.name.startswith(".") and _is_adapter(each)]
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read ({error.strerror})") from None
    steps = {int(found[1]): each for each in inside if (found := CHECKPOINT.fullmatch(each.name))}
    if inside and len(steps) == len(inside):
        raise AdapterError(
            f"{folder}: holds the checkpoints of a training run; give one of them, such as the newest, "
            f"{steps[max(steps)]}"
        )
    return inside


def _is_adapter(folder: Path) -> bool:
    """Whether a folder is meant to be an adapter, whole or broken."""
    if not folder.is_dir():
        return False
    return (folder / CONFIG_FILE).exists() or any(folder.glob("adapter_model.*")) or any(folder.glob("adapters.*"))
