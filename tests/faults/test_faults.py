"""A sample of the faults; all of them are in `python -m tests.faults`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.tracing import available

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not available(), reason="calls are traced on Linux on x86-64 only")


def faults(*arguments: Any) -> tuple[int, dict[str, Any]]:
    """What `python -m tests.faults` finds; its exit code first."""
    command = [sys.executable, "-m", "tests.faults", "--json", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout, result.stderr[-4000:]
    return result.returncode, json.loads(result.stdout)


def test_nothing_is_lost() -> None:
    code, found = faults("--only", "init", "--only", "picture", "--only", "merge", "--step", 9)
    assert (code, found["wrong"]) == (0, [])
    for name, counts in found["operations"].items():
        assert counts["calls"] > 5, name
        assert counts["kill"] and counts["EIO"], name


def test_writing_in_place_is_found() -> None:
    """The control: a picture that is written under its own name."""
    code, found = faults("--only", "picture", "--control", "--fault", "kill", "--fault", "ENOSPC", "--step", 2)
    assert code == 1
    assert any("neither the old nor the new one" in each for each in found["wrong"])
