"""Two processes come to the subspaces of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import surgery
from surgery.system.processes import Processes, processes
from tests.helpers.models import build, spread
from tests.helpers.processes import launch
from tests.helpers.reference import angle
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

ROOT = Path(__file__).parents[2]
CLASSIFIER = {"task": "seq-cls"}
# name -> model, data, options
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "uneven": ("llama", "five.jsonl", {}),
    "one at a time": ("llama", "five.jsonl", {"batch_size": 1}),
    "fewer than processes": ("llama", "five.jsonl", {"batch_size": 3, "samples": 4}),
    "many": ("wide", "many.jsonl", {"samples": 64, "batch_size": 16}),
    "in one batch": ("wide", "many.jsonl", {"samples": 64, "batch_size": 64, "variant": "vru2r"}),
    "few tokens": ("wide", "five.jsonl", {"samples": 1, "rank": 8}),
    "classes": ("bert", "classes.jsonl", CLASSIFIER),
    "classes in batches": ("bert", "classes.jsonl", {**CLASSIFIER, "batch_size": 3, "gradient_checkpointing": True}),
    "split": ("gpt2", "five.jsonl", {"rank": 4}),
}
SCRIPT = """
import json, sys, surgery
for name, (model, data, options) in json.loads(sys.argv[1]).items():
    _, report = surgery.init(model, "giva", f"two/{name}", data=data, **options)
    sys.stdout.write(json.dumps([name, report.loss, report.samples]) + "\\n")  # in one piece
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data."""
    folder = tmp_path_factory.mktemp("processes")
    for kind in ("llama", "bert", "gpt2"):
        build(kind).save_pretrained(folder / kind)
    torch.manual_seed(0)
    settings = {"hidden_size": 160, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, **settings))
    spread(wide)
    wide.save_pretrained(folder / "wide")
    for kind in ("llama", "bert", "gpt2", "wide"):
        save_tokenizer(folder / kind)
    write_rows(folder / "five.jsonl", text_rows(5, shortest=8))
    write_rows(folder / "many.jsonl", text_rows(64))
    write_rows(folder / "classes.jsonl", text_rows(11, labels=3))
    (folder / "script.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def reports(place: Path) -> dict[str, list[tuple[float, int]]]:
    """What both processes say of every run."""
    result = launch(place, "script.py", json.dumps(RUNS))
    assert result.returncode == 0, result.stderr
    said: dict[str, list[tuple[float, int]]] = {}
    for line in result.stdout.splitlines():
        name, loss, samples = json.loads(line)
        said.setdefault(name, []).append((loss, samples))
    return said


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_find_what_one_does(name: str, reports, place: Path) -> None:
    model, data, options = RUNS[name]
    alone, report = surgery.init(place / model, "giva", data=place / data, **options)
    together = surgery.Adapter.open(place / "two" / name)
    assert reports[name] == [(pytest.approx(report.loss, rel=1e-5), report.samples)] * 2
    assert together.tensors.keys() == alone.tensors.keys()
    assert together.config.keys() == alone.config.keys()
    for module, tensors in alone.modules.items():
        if "giva_A" in tensors:
            for A, expected in zip(
                *(each["giva_A"].split(tensors["giva_B"].shape[1]) for each in (together.modules[module], tensors)),
                strict=True,
            ):
                assert angle(A, expected) < 1e-3, module
        else:
            assert all(torch.equal(together.modules[module][short], tensor) for short, tensor in tensors.items())


def test_control_half_of_the_samples_is_another_subspace(place: Path, tmp_path: Path) -> None:
    lines = (place / "five.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join(lines[::2]))
    whole, half = (
        surgery.init(place / "llama", "giva", data=path)[0] for path in (place / "five.jsonl", tmp_path / "half.jsonl")
    )
    angles = [angle(half.modules[m]["giva_A"], tensors["giva_A"]) for m, tensors in whole.modules.items()]
    assert min(angles) > 1e-2


def test_command_line(place: Path) -> None:
    """One output, printed once."""
    options = ["--method", "giva", "--data", "five.jsonl", "llama", "-o", "by-command", "--json"]
    surgery_command = str(Path(sys.executable).with_name("surgery"))
    result = launch(place, "--no-python", surgery_command, "init", *options)
    assert (result.returncode, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["out"] == "by-command"
    alone, _ = surgery.init(place / "llama", "giva", data=place / "five.jsonl")
    together = surgery.Adapter.open(place / "by-command")
    assert max(angle(together.modules[m]["giva_A"], t["giva_A"]) for m, t in alone.modules.items()) < 1e-3
    assert {path.name for path in (place / "by-command").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "surgery.json",
    }


def test_one_process_is_not_connected(monkeypatch) -> None:
    assert processes(torch.device("cpu")) == Processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes(torch.device("cpu")).reduce is None
    assert processes(torch.device("cpu")).first
