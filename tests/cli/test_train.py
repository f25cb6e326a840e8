"""surgery train does what the library call does."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import surgery
from surgery.cli.main import cli
from tests.helpers.command_line import invoke
from tests.helpers.training_trained import BATCH, LR, QUICK, STEPS


def test_command(trained_place: Path, tmp_path: Path) -> None:
    options = ["--steps", STEPS, "--batch-size", BATCH, "--lr", LR, "--seed", 3]
    data = [
        "--base",
        trained_place / "bert",
        "--data",
        trained_place / "classes.jsonl",
        "--eval-data",
        trained_place / "others.jsonl",
    ]
    result = invoke("train", trained_place / "classifier", *data, "-o", tmp_path / "a", *options, "--json")
    announced = result.stderr.splitlines()
    assert result.exit_code == 0 and len(announced) == 1, result.stderr
    assert (
        announced[0].startswith(f"{STEPS} steps of {BATCH} samples: ")
        and f"learning rate {LR:g} (--lr)" in announced[0]
    )
    found = json.loads(result.stdout)
    keys = {"command", "out", "method", "peft_type", "modules", "trainable_parameters", "bytes", "seconds"}
    assert keys <= set(found) and found["command"] == "train"
    trained, report = surgery.train(
        trained_place / "classifier",
        trained_place / "bert",
        trained_place / "classes.jsonl",
        trained_place / "others.jsonl",
        seed=3,
        **QUICK,
    )
    written = surgery.Adapter.open(tmp_path / "a")
    assert all(torch.equal(written.tensors[name], tensor) for name, tensor in trained.tensors.items())
    assert found["after"]["loss"] == report.after.loss
    shown = invoke("train", trained_place / "classifier", *data, "-o", tmp_path / "b", *options)
    assert shown.exit_code == 0
    for word in ("before", "after", "accuracy", "giva_o, giva_s", "held-out data", f"{STEPS} of {STEPS}"):
        assert word in shown.stdout
    quiet = invoke("train", trained_place / "classifier", *data, "-o", tmp_path / "c", *options, "-q")
    assert quiet.stdout == f"{tmp_path / 'c'}\n"


def test_command_refuses_idle_options(trained_place: Path) -> None:
    data = ["--base", trained_place / "llama", "--data", trained_place / "texts.jsonl"]
    result = invoke("train", trained_place / "giva", *data, "--cache-teacher")
    assert result.exit_code == 2 and "belong to a training with --teacher" in result.stderr
    assert cli.name == "cli"
