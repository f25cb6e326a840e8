"""A store of packed adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from surgery.serving.store import Store


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Store:
    for name in ("ada", "bob", "team/cy"):
        shutil.copytree(packed, tmp_path / "adapters" / name)
    return Store(tmp_path / "adapters", tmp_path / "cache", dtype="float32")


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith("."))
