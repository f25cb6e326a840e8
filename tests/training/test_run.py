"""A training's run: nothing is written by a dry run, and what cannot be trained is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import CheckpointError, OutputError
from tests.helpers.command_line import contents
from tests.helpers.kinds import base_of, trained
from tests.helpers.models import edit_tensors, load_base, model_inputs, output, relative_difference, save_model
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


# Kinds of which PEFT saves a tensor under a name that does not follow from the parameter's.
SAVED_ELSEWHERE: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "DoRA": ("llama", lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])),
    "VB-LoRA": (
        "llama",
        lambda: peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, target_modules=["q_proj", "v_proj"]),
    ),
    "experts": (
        "qwen_moe",
        lambda: peft.LoraConfig(
            r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAVED_ELSEWHERE)
def test_what_was_evaluated_is_what_was_written(kind: str, tmp_path: Path) -> None:
    family, config = SAVED_ELSEWHERE[kind]
    base = base_of(family, tmp_path / "base")
    save_tokenizer(base)
    trained(base, tmp_path / "made", config())
    save_tokenizer(tmp_path / "made", chat_template="of the adapter")
    data = write_rows(tmp_path / "texts.jsonl", text_rows(8))
    places = tmp_path / "made", base, data
    adapter, report = surgery.train(*places, out=tmp_path / "out", learning_rate=0.03, max_steps=3, batch_size=4)
    _, again = surgery.train(tmp_path / "out", base, data, max_steps=1, batch_size=4)
    assert report.before is not None and report.after is not None and again.before is not None
    assert abs(report.after.loss - report.before.loss) > 1e-4
    assert again.before.loss == pytest.approx(report.after.loss, abs=1e-5)
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "out").eval()
        opened = output(surgery.load(adapter, load_base(base)).eval(), model_inputs("llama"))
        assert relative_difference(output(model, model_inputs("llama")), opened) < 1e-5
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "of the adapter"


def test_it_says_what_the_file_lacks(trained_place: Path, tmp_path: Path) -> None:
    base = trained_place / "llama"
    trained(base, tmp_path / "made", peft.LoraConfig(r=2, target_modules=["q_proj"]))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    edit_tensors(tmp_path / "made", edit, "adapter_model.safetensors")
    out = tmp_path / "out"
    _, report = surgery.train(tmp_path / "made", base, trained_place / "texts.jsonl", out=out, **QUICK)
    assert any("the file lacks 1 of the layers" in note for note in report.notes), report.notes
    _, again = surgery.train(out, base, trained_place / "texts.jsonl", dry_run=True, **QUICK)
    assert again.notes == []  # they have been trained with the others
