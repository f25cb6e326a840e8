"""Outputs that must not take the place of inputs."""

from __future__ import annotations

import os
from pathlib import Path

from surgery.errors import OutputError

__all__ = ["refuse_inputs"]


def refuse_inputs(out: Path, *inputs: str | Path | None, called: str | None = None) -> None:
    """Check that an output is none of the inputs and holds none of them, by whatever name.

    Args:
        out: the folder to appear.
        inputs: folders, Hub ids or None; what is no folder is passed over.
        called: what they are to the user; default the name of the folder that is in the way.

    Raises:
        OutputError: it is.
    """
    target = out.resolve()
    for folder in (Path(each).resolve() for each in inputs if each is not None and os.path.isdir(each)):
        if target == folder or target in folder.parents:
            what = f"holds {called}" if called is not None else f"is or holds {folder.name!r}, which is read"
            raise OutputError(f"{out}: {what}; choose another output with -o")
