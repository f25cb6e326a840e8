"""A short run of the fuzzer, and what its judge calls wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.campaign import SECRET, faults_of
from tests.fuzz.jsons import mutate_json
from tests.helpers.isolated import Outcome

ROOT = Path(__file__).parents[2]
MUTANTS = 200


def test_broken_inputs() -> None:
    """Another part of the same seed than the one whose counts are published."""
    command = [sys.executable, "-m", "tests.fuzz", "--json", "--mutants", MUTANTS, "--first", 10_000]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-6000:]
    found = json.loads(result.stdout)
    assert found["wrong"] == []
    kinds = [(name.partition(" ")[2], count) for name, count in found["counts"].items()]
    refused, accepted = (sum(count for name, count in kinds if name == kind) for kind in ("refused", "accepted"))
    assert refused + accepted > 0.95 * MUTANTS
    assert min(refused, accepted) > 0.2 * MUTANTS  # what is broken matters, and not everything is refused


SAID = "Error: /x/config.json: cannot be read as JSON\n"


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "wrong"),
    [
        (0, "done\n", "", []),
        (0, "done\n", "Note: something to know\n", []),
        (1, "", SAID, []),
        (None, "", "", ["ran out of time"]),
        (-11, "", "", ["exit code -11"]),
        (2, "", "Usage: surgery\nError: no such option\n", ["exit code 2"]),
        (1, "", f"Traceback (most recent call last)\n{SAID}", ["traceback"]),
        (1, "", "", ["0 error lines"]),
        (1, "", SAID + SAID, ["2 error lines"]),
        (1, "", f"{SAID}more\n", ["1 error lines"]),
        (1, "", "Error: \n", ["an error that says little"]),
        (1, "", f"Error: {'x' * 5000}\n", ["an error of 5007 characters"]),
        (1, "half\n", SAID, ["output before an error"]),
        (1, '{"command": "merge", "error": "no such folder"}\n', SAID, []),
        (1, '{"command": "merge", "error"', SAID, ["output before an error"]),
        (0, f"{SECRET}\n", "", ["tells what is elsewhere"]),
        (0, "\x1b[2J\n", "", ["control characters"]),
        (0, "done\n", "UserWarning: of a library\n", ["other lines on stderr"]),
    ],
)
def test_judge(code: int | None, stdout: str, stderr: str, wrong: list[str]) -> None:
    assert faults_of(Outcome(code, stdout, stderr)) == wrong


def test_mutants_are_made_again(tmp_path: Path) -> None:
    texts = set()
    for number in range(40):
        made = []
        for _ in range(2):
            (tmp_path / "x.json").write_text(json.dumps({"a": 1, "b": {"c": [1, 2]}, "d": "text"}))
            done = mutate_json(tmp_path / "x.json", random.Random(number))
            made.append((done, (tmp_path / "x.json").read_text()))
        assert made[0] == made[1]
        texts.add(made[0][1])
    assert len(texts) > 30
