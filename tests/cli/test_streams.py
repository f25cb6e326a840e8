"""Standard streams that are closed, full, or whose reader is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SURGERY = [sys.executable, "-m", "surgery"]
MISSING = "missing: no such folder"


def run(*words: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    kept = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.run([*SURGERY, *words], text=True, check=False, **{**kept, **streams})


def closing(number: int) -> dict[str, Any]:
    return {"preexec_fn": lambda: os.close(number)}


@pytest.mark.parametrize("words", [["methods"], ["methods", "--json"], ["methods", "-q"], ["--help"], ["init", "-h"]])
def test_stdout_that_is_closed_or_full_is_one_line(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        for streams in ({"stdout": full}, closing(1)):
            result = run(*words, **streams)
            assert result.returncode == 1
            assert len(result.stderr.splitlines()) == 1
            assert result.stderr.startswith("Error: standard output cannot be written (")


def test_a_reader_that_is_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = run("methods", stdout=writing)
    os.close(writing)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_stderr_that_is_full_or_closed() -> None:
    with Path("/dev/full").open("w") as full:
        assert run("methods", stderr=full).returncode == 0  # nothing was to be said there
        for streams in ({"stderr": full}, closing(2)):
            result = run("inspect", "missing", "--json", **streams)
            assert result.returncode == 1
            assert json.loads(result.stdout)["error"].startswith(MISSING)


def test_all_three_closed() -> None:
    def close() -> None:
        for number in range(3):
            os.close(number)

    assert run("methods", preexec_fn=close).returncode == 1


def test_a_file_does_not_take_the_place_of_a_closed_stream(llama: Path, tmp_path: Path) -> None:
    result = run("init", "--method", "vera", str(llama), "-o", str(tmp_path / "out"), **closing(1))
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("Error: standard output")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "VERA"
