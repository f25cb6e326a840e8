"""surgery merge does what the library call does, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest

import surgery
from tests.helpers.command_line import invoke
from tests.helpers.merges import trained
from tests.helpers.models import (
    load_base,
)


class TestCommand:
    """`surgery merge` in the terminal."""

    @pytest.fixture
    def adapter(self, llama: Path, tmp_path: Path) -> Path:
        return trained(load_base(llama), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "lora")

    def test_the_summary_says_what_was_done(self, adapter, llama, tmp_path: Path) -> None:
        result = invoke("merge", adapter, "--base", llama, "-o", tmp_path / "merged", "-v")
        assert result.exit_code == 0
        for words in ("as LlamaForCausalLM", "LORA, 3 layers", "|dW|", f"written  {tmp_path / 'merged'}"):
            assert words in result.stdout
        assert "model.layers.2.self_attn.q_proj" in result.stdout

    def test_json_is_all_there_is_on_stdout(self, adapter, llama, tmp_path: Path) -> None:
        result = invoke("merge", adapter, "--base", llama, "-o", tmp_path / "merged", "--json")
        found = json.loads(result.stdout)
        assert {"command", "out", "bytes", "seconds", "modules", "peft_type", "trainable_parameters"} <= set(found)
        assert found["command"] == "merge" and found["modules"] == 3 and len(found["sites"]) == 3

    def test_the_default_output_is_named_after_the_adapter(self, adapter, llama, tmp_path, monkeypatch) -> None:
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        assert invoke("merge", adapter, "--base", llama, "-q").stdout == "lora-merged\n"
        assert (tmp_path / "work" / "lora-merged" / "config.json").is_file()

    def test_an_untrained_adapter_is_said_to_change_nothing(self, llama: Path, tmp_path: Path) -> None:
        surgery.init(llama, "inilora", tmp_path / "start")
        result = invoke("merge", tmp_path / "start", "--base", llama, "-o", tmp_path / "merged")
        assert "changes no weight" in result.stderr and "change   none" in result.stdout

    def test_wrong_input_is_one_line_and_exit_1(self, adapter, llama, tmp_path: Path) -> None:
        for words in ([tmp_path / "nowhere", "--base", llama], [adapter, "--base", adapter], [llama, "--base", llama]):
            result = invoke("merge", *words, "-o", tmp_path / "merged")
            assert result.exit_code == 1 and result.stdout == ""
            assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
        assert invoke("merge", adapter).exit_code == 2
