"""A training that is interrupted or killed ends as one in one go."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.training.run_folder import Unfinished
from tests.helpers.training_resumed import OPTIONS, STEPS, assert_same_end

FLAGS = ["--steps", STEPS, "--batch-size", 8, "--lr", 3e-3, "--save-every", 10, "--seed", 5]
COMMAND = str(Path(sys.executable).with_name("surgery"))


def arguments(begun_place: Path, out: Path, *more: Any) -> list[str]:
    data = ["--base", begun_place / "bert", "--data", begun_place / "data.jsonl", "-o", out]
    return [COMMAND, "train", str(begun_place / "start"), *map(str, [*data, *FLAGS, *more])]


def begun(begun_place: Path, out: Path, after: int, *more: Any) -> subprocess.Popen[str]:
    """A training in a process of its own that has come to a checkpoint."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments(begun_place, out, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    mark = out.parent / f".{out.name}.unfinished" / f"checkpoint-{after}"
    for _ in range(12000):
        if mark.exists() or process.poll() is not None:
            break
        time.sleep(0.005)
    return process


def test_resume_after_a_kill(begun_place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chance = random.SystemRandom()
    # By what it has done, not by the clock alone: a quick machine is at the end in half a second.
    process = begun(begun_place, out, chance.choice((10, 20, 30)))
    time.sleep(chance.random() * 0.1)
    process.kill()
    process.communicate()
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    kept = Unfinished(out).step
    _, report = surgery.train(
        begun_place / "start", begun_place / "bert", begun_place / "data.jsonl", out=out, **OPTIONS
    )
    assert any(note.startswith(f"goes on after step {kept} ") for note in report.notes) == (kept > 0)
    assert report.steps_done == STEPS and list(tmp_path.iterdir()) == [out]
    assert_same_end(out, begun_place)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(number: int, code: int, begun_place: Path, tmp_path: Path) -> None:
    """The adapter as it is is saved, opens, and the same command goes on to the same end."""
    out = tmp_path / "out"
    process = begun(begun_place, out, 10)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (code, ""), stderr
    step = json.loads((out / "surgery.json").read_text())["steps_done"]
    assert f"Interrupted after step {step}; {out} holds the adapter; the same command goes on." in stderr
    assert 10 <= step < STEPS and len((out / "loss.jsonl").read_text().splitlines()) == step
    start = surgery.Adapter.open(begun_place / "start").tensors
    saved = surgery.Adapter.open(out).tensors
    assert any(not torch.equal(saved[name], tensor) for name, tensor in start.items())
    _, report = surgery.train(
        begun_place / "start", begun_place / "bert", begun_place / "data.jsonl", out=out, resume=True, **OPTIONS
    )
    assert report.steps_done == STEPS
    assert list(tmp_path.iterdir()) == [out]
    assert_same_end(out, begun_place)
