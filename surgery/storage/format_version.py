"""The version of our layout of files, and what happens to files of another one."""

from __future__ import annotations

from typing import Any

from surgery.errors import AdapterError

__all__ = [
    "BLOCKS_VERSION",
    "FIRST_VERSION",
    "FORMAT_VERSION",
    "GAINS_VERSION",
    "KINDS_VERSION",
    "check_format_version",
]

# A file states the lowest version whose readers understand it, so that an older reader refuses only what it would
# misread.
FIRST_VERSION = 1
BLOCKS_VERSION = 2  # SMoA's diagonal blocks
KINDS_VERSION = 3  # packed GiVA on embeddings, convolutions, experts; single tokens
GAINS_VERSION = 4  # packed GiVA with gains on the base weight
# The highest version that is read.
FORMAT_VERSION = 4


def check_format_version(version: Any, where: object) -> None:
    """Refuse what a later version wrote.

    Args:
        version: as in the file.
        where: the file, or what an error calls the adapter.

    Raises:
        AdapterError: it is later than ours, or no version.
    """
    known = isinstance(version, int) and not isinstance(version, bool) and 1 <= version <= FORMAT_VERSION
    if not known:
        raise AdapterError(
            f"{where}: the adapter has format version {version}, this surgery reads up to {FORMAT_VERSION}: "
            "upgrade with pip install -U adapter-surgery"
        )
