"""Versions of our files: those up to ours are read, all else is refused."""

from __future__ import annotations

from typing import Any

import pytest

from surgery.errors import AdapterError
from surgery.storage.format_version import FIRST_VERSION, FORMAT_VERSION, check_format_version


def test_every_version_up_to_ours_is_read() -> None:
    for version in range(FIRST_VERSION, FORMAT_VERSION + 1):
        check_format_version(version, "adapter")


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, True, 1.0, "1", None])
def test_all_else_is_refused(version: Any) -> None:
    with pytest.raises(AdapterError, match=f"adapter: .* format version {version}, .* up to {FORMAT_VERSION}: upgrade"):
        check_format_version(version, "adapter")
