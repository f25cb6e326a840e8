"""A folder that holds adapters in folders of their own: named adapters of one model, or checkpoints of a training."""

from __future__ import annotations

import re
from pathlib import Path

from surgery.adapters.names import CONFIG_FILE
from surgery.errors import AdapterError, listing

__all__ = ["inner_adapter"]

CHECKPOINT = re.compile(r"(?:checkpoint|step|epoch)[-_](\d+)")


def inner_adapter(folder: Path) -> Path:
    """Return the folder itself, or the one adapter inside where it holds nothing else that is an adapter or a model.

    Raises:
        AdapterError: it holds several adapters, or checkpoints of a training.
    """
    try:
        if any((folder / name).exists() for name in (CONFIG_FILE, "config.json")):
            return folder
        inside = sorted(path for path in folder.iterdir() if (path / CONFIG_FILE).is_file())
    except OSError:
        return folder  # whoever opens it says so
    steps = {int(match[1]): path for path in inside if (match := CHECKPOINT.fullmatch(path.name)) is not None}
    if steps:
        newest = steps[max(steps)]
        raise AdapterError(
            f"{folder}: holds {len(inside)} folders with an adapter ({listing([path.name for path in inside], 3)}); "
            f"give the one that is meant: {newest} is the newest checkpoint"
        )
    if len(inside) > 1:
        raise AdapterError(
            f"{folder}: holds {len(inside)} adapters ({listing([path.name for path in inside], 3)}); give one of them, "
            f"such as {inside[0]}"
        )
    return inside[0] if inside else folder
