"""Whether an output may be written where it is asked for; imports nothing heavy, so that it is told at once."""

from __future__ import annotations

import os
from pathlib import Path

from surgery.errors import OutputError

__all__ = ["check_output", "refuse_inputs", "unfinished_folder"]


def unfinished_folder(out: Path) -> Path:
    """Return the hidden folder beside an output in which a training that is not finished lies."""
    return out.absolute().parent / f".{out.absolute().name}.unfinished"


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


def check_output(target: Path, force: bool = False) -> None:
    """Check that an output folder may be written, before any work is done.

    Raises:
        OutputError: the target is a file, or a folder that is not empty and `force` is not set; or the folder that
            is to hold it cannot be written.
    """
    try:
        _check_output(target, force)
    except OSError as error:  # a name that no file system takes, a folder that may not be looked into
        raise OutputError(f"{target}: cannot be written ({error.strerror})") from None


def _check_output(target: Path, force: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"{target}: exists and is not a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise OutputError(
            f"{target}: exists and is not empty; choose another output with -o, or replace it with --force"
        )
    if target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"{target}: holds the working directory; choose another output with -o")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{target}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{target}: no permission to write in {parent}")
