"""Keeping compiled code from printing where a command's own output goes, which may be JSON."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

__all__ = ["nothing_printed"]

STDOUT = 1


@contextlib.contextmanager
def nothing_printed() -> Iterator[None]:
    """What the block prints on the process's standard output goes nowhere, from whichever language.

    The tokenizers library prints names of settings that it does not know, as they are in the file.
    """
    sys.stdout.flush()
    try:
        kept = os.dup(STDOUT)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, STDOUT)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, STDOUT)
        os.close(kept)
        os.close(nowhere)
