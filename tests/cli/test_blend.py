"""Tests of `surgery blend` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig

from surgery.blending.combinations import COMBINATIONS
from surgery.cli.blend import HOW
from tests.helpers.adapters import make_adapter
from tests.helpers.command_line import invoke


def test_on_the_command_line(llama: Path, tmp_path: Path) -> None:
    members = {
        name: make_adapter(llama, tmp_path / name, LoraConfig(r=2, target_modules=["q_proj"]), seed)
        for seed, name in enumerate(("lora", "rslora"))
    }
    done = invoke("blend", f"{members['lora']}=0.5", members["rslora"], "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "remains" in done.output and "0.5" in done.output
    shown = invoke("blend", f"{members['lora']}=0.5", members["rslora"], "-o", tmp_path / "two", "--json")
    found = json.loads(shown.stdout)
    assert found["command"] == "blend" and [each["weight"] for each in found["members"]] == [0.5, 1.0]
    again = invoke("blend", members["lora"], members["rslora"], "-o", tmp_path / "out")
    assert again.exit_code == 1 and "exists" in again.output
    odd = invoke("blend", f"{members['lora']}=much", members["rslora"], "-o", tmp_path / "three")
    assert odd.exit_code == 1 and "write ADAPTER=WEIGHT" in odd.output
    density = invoke("blend", members["lora"], members["rslora"], "--density", "0.5", "-o", tmp_path / "four")
    assert density.exit_code == 1 and "drops no entries" in density.output


def test_the_commands_choices_are_the_table() -> None:
    assert tuple(COMBINATIONS) == HOW
