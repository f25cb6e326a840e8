"""Killed, interrupted, shared out to processes: a training comes to the same end."""

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
from surgery.errors import MethodError, OutputError
from surgery.training.interruption import TrainingInterrupted
from surgery.training.run_folder import Unfinished
from tests.helpers.models import save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows
from tests.system.test_processes import launch

STEPS = 60
OPTIONS = {"steps": STEPS, "batch_size": 8, "lr": 3e-3, "save_every": 10, "seed": 5}
FLAGS = ["--steps", STEPS, "--batch-size", 8, "--lr", 3e-3, "--save-every", 10, "--seed", 5]
COMMAND = str(Path(sys.executable).with_name("surgery"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with dropout, an adapter that starts well, data, and what a training of it comes to."""
    folder = tmp_path_factory.mktemp("resume")
    save_tokenizer(save_model("bert", folder / "bert"))
    write_rows(folder / "data.jsonl", text_rows(48, labels=3))
    surgery.init(folder / "bert", "giva", folder / "start", task="seq-cls", data=folder / "data.jsonl", rank=2)
    surgery.train(folder / "start", folder / "bert", folder / "data.jsonl", out=folder / "whole", **OPTIONS)
    return folder


def arguments(place: Path, out: Path, *more: Any) -> list[str]:
    data = ["--base", place / "bert", "--data", place / "data.jsonl", "-o", out]
    return [COMMAND, "train", str(place / "start"), *map(str, [*data, *FLAGS, *more])]


def begun(place: Path, out: Path, after: int, *more: Any) -> subprocess.Popen[str]:
    """A training in a process of its own that has come to a checkpoint."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments(place, out, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    mark = out.parent / f".{out.name}.unfinished" / f"checkpoint-{after}"
    for _ in range(12000):
        if mark.exists() or process.poll() is not None:
            break
        time.sleep(0.005)
    return process


def assert_same_end(out: Path, place: Path) -> None:
    """The loss to 1e-4, as asked for; on one machine, to the last bit."""
    whole, found = (
        [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
        for folder in (place / "whole", out)
    )
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert found[-1]["loss"] == pytest.approx(whole[-1]["loss"], abs=1e-4)
    expected, tensors = (surgery.Adapter.open(folder).tensors for folder in (place / "whole", out))
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-6)


def test_resume_after_a_kill(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chance = random.SystemRandom()
    # By what it has done, not by the clock alone: a quick machine is at the end in half a second.
    process = begun(place, out, chance.choice((10, 20, 30)))
    time.sleep(chance.random() * 0.1)
    process.kill()
    process.communicate()
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    kept = Unfinished(out).step
    _, report = surgery.train(place / "start", place / "bert", place / "data.jsonl", out=out, **OPTIONS)
    assert any(note.startswith(f"goes on after step {kept} ") for note in report.notes) == (kept > 0)
    assert report.steps_done == STEPS and list(tmp_path.iterdir()) == [out]
    assert_same_end(out, place)


def stopped(place: Path, out: Path, at: int) -> TrainingInterrupted:
    """A training in this process that is interrupted after a step."""

    def stop(step: int, steps: int, what: str) -> None:
        if step == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingInterrupted) as caught:
        surgery.train(place / "start", place / "bert", place / "data.jsonl", out=out, progress=stop, **OPTIONS)
    return caught.value


def test_a_checkpoint_that_a_kill_cut_short_is_not_used(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(place, out, 34)
    last = tmp_path / ".out.unfinished" / "checkpoint-34"
    (last / "complete").unlink()
    (last / "optimizer.pt").write_bytes(b"cut")
    assert Unfinished(out).step == 30
    surgery.train(place / "start", place / "bert", place / "data.jsonl", out=out, resume=True, **OPTIONS)
    assert_same_end(out, place)


def test_resume_without_anything_to_go_on_from(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, report = surgery.train(place / "start", place / "bert", place / "data.jsonl", out=out, resume=True, **OPTIONS)
    assert not any("goes on" in note for note in report.notes)
    assert_same_end(out, place)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(number: int, code: int, place: Path, tmp_path: Path) -> None:
    """The adapter as it is is saved, opens, and the same command goes on to the same end."""
    out = tmp_path / "out"
    process = begun(place, out, 10)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (code, ""), stderr
    step = json.loads((out / "surgery.json").read_text())["steps_done"]
    assert f"Interrupted after step {step}; {out} holds the adapter; the same command goes on." in stderr
    assert 10 <= step < STEPS and len((out / "loss.jsonl").read_text().splitlines()) == step
    start = surgery.Adapter.open(place / "start").tensors
    saved = surgery.Adapter.open(out).tensors
    assert any(not torch.equal(saved[name], tensor) for name, tensor in start.items())
    _, report = surgery.train(place / "start", place / "bert", place / "data.jsonl", out=out, resume=True, **OPTIONS)
    assert report.steps_done == STEPS
    assert list(tmp_path.iterdir()) == [out]
    assert_same_end(out, place)


def test_other_options_are_not_gone_on_with(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    error = stopped(place, out, 12)
    assert (error.signal, error.step, error.out) == (signal.SIGINT, 12, str(out))
    with pytest.raises(MethodError, match=r"12 steps are kept \(lr 0.003, now 0.01\); repeat .* --force"):
        surgery.train(place / "start", place / "bert", place / "data.jsonl", out=out, **{**OPTIONS, "lr": 0.01})
    surgery.train(place / "start", place / "bert", place / "data.jsonl", out=out, **OPTIONS)
    assert_same_end(out, place)


@pytest.mark.parametrize("options", [{"lr": 0.01, "overwrite": True}, {"resume": False, "overwrite": True}])
def test_a_training_that_starts_again(options: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """With other options and `overwrite`, or without `resume`: the steps that were kept count for nothing."""
    out = tmp_path / "out"
    stopped(place, out, 12)
    with pytest.raises(OutputError, match="exists and is not empty"):  # the adapter as it was is not replaced
        surgery.train(place / "start", place / "bert", place / "data.jsonl", out=out, resume=False, **OPTIONS)
    given = {**OPTIONS, **options}
    _, report = surgery.train(place / "start", place / "bert", place / "data.jsonl", out=out, **given)
    assert report.steps_done == STEPS and not any("goes on" in note for note in report.notes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_what_one_does(place: Path, tmp_path: Path) -> None:
    """Without dropout, whose draws differ; a language model, whose loss is a mean over tokens, and a classifier."""
    plain = {"steps": 6, "batch_size": 8, "lr": 1e-2, "seed": 2}
    runs = {}
    save_tokenizer(save_model("llama", tmp_path / "llama"))
    write_rows(tmp_path / "texts.jsonl", text_rows(24))
    surgery.init(tmp_path / "llama", "inilora", tmp_path / "inilora", rank=2)
    config = json.loads((place / "bert" / "config.json").read_text())
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    for path in (place / "bert").iterdir():
        (quiet / path.name).write_bytes(path.read_bytes())
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (quiet / "config.json").write_text(json.dumps({**config, **off}))
    runs["llama"] = (tmp_path / "inilora", tmp_path / "llama", tmp_path / "texts.jsonl", None)
    runs["bert"] = (place / "start", quiet, place / "data.jsonl", None)
    runs["taught"] = (place / "start", quiet, place / "data.jsonl", place / "whole")
    script = "import sys, json, surgery\nfor name, (a, b, d, t) in json.loads(sys.argv[1]).items():\n" \
        f"    surgery.train(a, b, d, out='two-' + name, teacher=t, **{plain!r})\n"  # fmt: skip
    (tmp_path / "script.py").write_text(script)
    named = json.dumps({name: [str(part) if part else None for part in parts] for name, parts in runs.items()})
    result = launch(tmp_path, "script.py", named)
    assert result.returncode == 0, result.stderr
    for name, (adapter, base, data, teacher) in runs.items():
        alone, report = surgery.train(adapter, base, data, teacher=teacher, **plain)
        together = surgery.Adapter.open(tmp_path / f"two-{name}")
        after = together.provenance["after"]
        assert after["items"] == report.after.items
        if teacher:  # hidden states are measured against those of a process's own part of the batch
            assert report.after.kl < 0.8 * report.before.kl
            assert after["kl"] == pytest.approx(report.after.kl, rel=0.05)
            continue
        start = surgery.Adapter.open(adapter)
        moved = apart = 0.0
        for key, tensor in alone.tensors.items():
            moved = max(moved, float((tensor - start.tensors[key]).abs().max()))
            apart = max(apart, float((tensor - together.tensors[key]).abs().max()))
        assert apart < 0.02 * moved, name
        rows = [json.loads(line) for line in (tmp_path / f"two-{name}" / "loss.jsonl").read_text().splitlines()]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in report.loss], rel=1e-2)
        assert after["loss"] == pytest.approx(report.after.loss, rel=1e-3)
