"""A training's run: nothing is written by a dry run, and what cannot be trained is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import CheckpointError, OutputError
from tests.helpers.command_line import contents
from tests.helpers.models import save_model
from tests.helpers.processes import launch
from tests.helpers.texts import save_tokenizer, text_rows, write_rows
from tests.helpers.training_trained import QUICK


def test_dry_run_and_no_output_write_nothing(trained_place: Path, tmp_path: Path) -> None:
    _, planned = surgery.train(
        trained_place / "giva",
        trained_place / "llama",
        trained_place / "texts.jsonl",
        out=tmp_path / "out",
        dry_run=True,
        **QUICK,
    )
    assert planned.dry_run and planned.steps_done == 0 and not list(tmp_path.iterdir())
    with contextlib.chdir(tmp_path):
        _, report = surgery.train(
            trained_place / "giva", trained_place / "llama", trained_place / "texts.jsonl", **QUICK
        )
    assert report.out is None and not list(tmp_path.iterdir())


def test_an_output_is_not_replaced_without_force(trained_place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.train(trained_place / "giva", trained_place / "llama", trained_place / "texts.jsonl", out=out, **QUICK)
    before = contents(out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        surgery.train(trained_place / "giva", trained_place / "llama", trained_place / "texts.jsonl", out=out, **QUICK)
    assert contents(out) == before
    surgery.train(
        trained_place / "giva",
        trained_place / "llama",
        trained_place / "texts.jsonl",
        out=out,
        force=True,
        seed=1,
        **QUICK,
    )
    assert contents(out) != before


def test_a_base_whose_weights_are_not_finite(trained_place: Path, tmp_path: Path) -> None:
    """It is the base that is named, not the learning rate."""
    shutil.copytree(trained_place / "llama", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the base model's model\.layers\.1\.mlp\.up_proj\.weight holds values"):
        surgery.train(
            trained_place / "giva", tmp_path / "base", trained_place / "texts.jsonl", out=tmp_path / "out", **QUICK
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_two_processes_do_what_one_does(begun_place: Path, tmp_path: Path) -> None:
    """Without dropout, whose draws differ; a language model, whose loss is a mean over tokens, and a classifier."""
    plain = {"steps": 6, "batch_size": 8, "lr": 1e-2, "seed": 2}
    runs = {}
    save_tokenizer(save_model("llama", tmp_path / "llama"))
    write_rows(tmp_path / "texts.jsonl", text_rows(24))
    surgery.init(tmp_path / "llama", "inilora", tmp_path / "inilora", rank=2)
    config = json.loads((begun_place / "bert" / "config.json").read_text())
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    for path in (begun_place / "bert").iterdir():
        (quiet / path.name).write_bytes(path.read_bytes())
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (quiet / "config.json").write_text(json.dumps({**config, **off}))
    runs["llama"] = (tmp_path / "inilora", tmp_path / "llama", tmp_path / "texts.jsonl", None)
    runs["bert"] = (begun_place / "start", quiet, begun_place / "data.jsonl", None)
    runs["taught"] = (begun_place / "start", quiet, begun_place / "data.jsonl", begun_place / "whole")
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
