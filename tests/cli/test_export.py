"""`surgery export` on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import pytest

from tests.helpers.adapters import make_adapter
from tests.helpers.command_line import invoke

CONFIG = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Path:
    return make_adapter(llama, tmp_path / "lora", CONFIG)


def test_json_and_the_default_output(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("export", "lora", "--for", "vllm", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["command"] == "export" and found["out"] == "lora-vllm"
    assert {"to", "peft_type", "modules", "trainable_parameters", "bytes", "seconds", "sites"} <= set(found)
    assert (tmp_path / "lora-vllm" / "adapter_model.safetensors").stat().st_size == found["bytes"]


def test_the_summary_names_the_settings_and_the_command(lora: Path, tmp_path: Path) -> None:
    result = invoke("export", lora, "--for", "vllm", "-o", tmp_path / "out", "-v")
    assert result.exit_code == 0 and "max lora rank  8" in result.stdout and "vllm serve" in result.stdout
    assert "exact but for rounding" in result.stdout and "model.layers.0.self_attn.q_proj" in result.stdout


def test_a_dry_run_writes_nothing(lora: Path, tmp_path: Path) -> None:
    result = invoke("export", lora, "--for", "sglang", "-o", tmp_path / "out", "--dry-run", "--rank", 2)
    assert result.exit_code == 0 and "nothing written" in result.stdout and "cut: the server's dW" in result.stdout
    assert not (tmp_path / "out").exists()


def test_quiet_prints_the_folder(lora: Path, tmp_path: Path) -> None:
    result = invoke("export", lora, "--for", "mlx", "-o", tmp_path / "out", "-q")
    assert result.stdout == f"{tmp_path / 'out'}\n" and not result.stderr


def test_an_unknown_target_is_a_usage_error(lora: Path) -> None:
    result = invoke("export", lora, "--for", "tgi")
    assert result.exit_code == 2 and "'tgi' is not one of" in " ".join(result.stderr.split())


def test_a_target_that_is_planned_is_a_named_error(lora: Path) -> None:
    result = invoke("export", lora, "--for", "kohya", "--json")
    assert result.exit_code == 1 and "not written yet" in json.loads(result.stdout)["error"]
    assert result.stderr.startswith("Error: kohya")


def test_without_the_gguf_package_one_line_names_the_extra(
    lora: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = invoke("export", lora, "--for", "llama.cpp", "--base", llama, "-o", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "adapter-surgery[gguf]" in result.stderr
