"""surgery inspect: the table, JSON, and what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.command_line import contents, invoke


class TestCommand:
    """`surgery inspect` in the terminal."""

    def test_the_table(self, lora: Path, tmp_path: Path) -> None:
        before = contents(tmp_path)
        result = invoke("inspect", lora, "-v")
        assert result.exit_code == 0 and contents(tmp_path) == before
        for words in ("LORA adapter, CAUSAL_LM", "6 changed", "95 % in", "model.layers.*.mlp.down_proj", "32 x 48"):
            assert words in result.stdout
        assert "model.layers.2.mlp.down_proj" in result.stdout

    def test_json_is_all_there_is_on_stdout(self, lora: Path, tmp_path: Path) -> None:
        result = invoke("inspect", lora, "--json", "--plot", tmp_path / "x.png")
        found = json.loads(result.stdout)
        assert {"command", "out", "bytes", "seconds", "modules"} <= set(found)
        assert found["command"] == "inspect" and found["out"] == str(tmp_path / "x.png") and len(found["sites"]) == 6

    def test_quiet_prints_the_size(self, lora: Path) -> None:
        assert invoke("inspect", lora, "-q").stdout.endswith("iB\n")

    def test_wrong_input_is_one_line_and_exit_1(self, tmp_path: Path) -> None:
        result = invoke("inspect", tmp_path / "nowhere")
        assert result.exit_code == 1 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
