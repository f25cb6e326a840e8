"""What goes to stdout and what to stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgery.methods.registry import method_info, method_names
from tests.helpers.init_runs import WEIGHTS, adapter_config, init

REPORT_KEYS = {
    "command", "out", "method", "peft_type", "modules", "trainable_parameters", "bytes", "seconds", "sites",
}  # fmt: skip
SITE_KEYS = {"module", "rank", "bytes"}


@pytest.mark.parametrize("method", method_names())
def test_json_is_all_there_is_on_stdout(method: str, texted_llama: Path, tmp_path: Path) -> None:
    result = init(texted_llama, method, tmp_path / "out", "--json")
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert set(report) >= REPORT_KEYS
    assert report["command"] == "init"
    assert report["out"] == str(tmp_path / "out")
    assert (report["method"], report["peft_type"]) == (method, method_info(method).peft_type)
    assert report["modules"] == len(report["sites"]) == 21
    assert all(set(site) >= SITE_KEYS for site in report["sites"])
    assert report["bytes"] == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert report["trainable_parameters"] == sum(site["parameters"] for site in report["sites"]) > 0
    assert report["seconds"] > 0
    assert adapter_config(tmp_path / "out")["peft_type"] == report["peft_type"]


def test_quiet_prints_only_the_folder(texted_llama: Path, tmp_path: Path) -> None:
    result = init(texted_llama, "smoa", tmp_path / "out", "-q")
    assert (result.stdout, result.stderr) == (f"{tmp_path / 'out'}\n", "")


@pytest.mark.parametrize("task", ["seq-cls", None])
def test_notes_go_to_stderr(task: str | None, texted_llama: Path, tmp_path: Path) -> None:
    result = init(texted_llama, "smoa", tmp_path / "out", *(["--task", task] if task else []))
    notes = [
        "Note: smoa is the published form since 0.2.0: K diagonal blocks, about 1/K of a LoRA's trained numbers; what "
        "0.1.0 made is --variant components",
        "Note: blocks of 6 of 21 layers have fewer rows or columns than their rank, up to 16: a lower --rank trains "
        "fewer numbers with the same freedom there",
    ]
    if task:
        notes.append("Note: the checkpoint has no score: a fresh one, seeded, is saved with the adapter")
    assert result.stderr.splitlines() == notes
    assert "Note" not in result.stdout
