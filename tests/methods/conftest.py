"""Fixtures that several files of this folder use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def installed(tmp_path: Path):
    """Install a package with an entry point `name = value` beside its modules; returns how to run code with it."""

    def install(modules: dict[str, str], name: str = "tilt", value: str = "tilting:INFO"):
        place = tmp_path / "site"
        for module, text in modules.items():
            (place / module).parent.mkdir(parents=True, exist_ok=True)
            (place / module).write_text(text)
        (place / "tilting-1.dist-info").mkdir()
        (place / "tilting-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tilting\nVersion: 1\n")
        (place / "tilting-1.dist-info" / "entry_points.txt").write_text(f"[surgery.methods]\n{name} = {value}\n")
        paths = os.pathsep.join([str(place), str(Path(__file__).parents[2])])

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            environment = {**os.environ, "PYTHONPATH": paths}
            return subprocess.run(
                [sys.executable, *arguments], check=False, capture_output=True, text=True, env=environment, cwd=tmp_path
            )

        return run

    return install
