"""Checks of a folder that comes from elsewhere: only files, and no links that lead out of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from surgery.errors import CheckpointError

__all__ = ["check_files", "check_link"]


def check_files(folder: Path) -> None:
    """Check that a folder may be looked into, and that what is in it are files and folders.

    A pipe would make whoever reads it wait, and a device may have no end.

    Raises:
        CheckpointError: it may not, or something else is in it.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # a link to nowhere: whoever needs the file says so
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CheckpointError(f"{path}: is a pipe, a socket or a device, not a file; take it out of the folder")


def check_link(path: Path, folder: Path) -> None:
    """Check that a file whose content is passed on is in its folder: a link may lead to somebody's secrets.

    The links of the Hub's cache, from a snapshot to the repository's own `blobs`, are no such links.

    Raises:
        CheckpointError: it is a link that leads out of the folder.
    """
    if not path.is_symlink():
        return
    home, target = (Path(os.path.realpath(each)) for each in (folder, path))  # which stands a link to itself
    cache = next((parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"), home)
    if home not in target.parents and cache not in target.parents:
        raise CheckpointError(f"{path}: is a link that leads out of its folder; put the file itself there")
