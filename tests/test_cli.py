"""The command line: its help, what goes to stdout and stderr, and that it does what the library call does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import pytest

from tests.helpers.command_line import contents, flags, invoke
from tests.helpers.init_runs import WEIGHTS, adapter_config, init


def adapted(result: click.testing.Result) -> set[str]:
    """Endings of the names of the adapted layers, from `--json`."""
    return {site["module"].rpartition(".")[2] for site in json.loads(result.stdout)["sites"]}


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("model", "model-vera"),
        ("model/", "model-vera"),
        ("./deep/model", "model-vera"),
        (".", "here-vera"),
        ("../here", "here-vera"),
        ("deep/..", "here-vera"),
    ],
)
def test_default_output(argument: str, name: str, texted_llama: Path, tmp_path: Path, monkeypatch) -> None:
    here = shutil.copytree(texted_llama, tmp_path / "here")
    for folder in ("model", "deep/model"):
        shutil.copytree(texted_llama, here / folder)
    monkeypatch.chdir(here)
    before = set(contents(here))
    result = invoke("init", argument, "--method", "vera", "-q")
    assert result.stdout == f"{name}\n"
    files = {f"{name}/{file}" for file in ("adapter_config.json", WEIGHTS, "surgery.json")}
    assert set(contents(here)) - before == {name, *files}


@pytest.mark.parametrize(
    ("targets", "roles"),
    [
        ([], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["self_attn.q_proj", "lm_head"], {"q_proj", "lm_head"}),
        ([r".*\.(gate|up)_proj"], {"gate_proj", "up_proj"}),
        ([r".*\.gate_.*", "k_proj"], {"gate_proj", "k_proj"}),
        (
            ["all-linear", "lm_head"],
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"},
        ),
    ],
)
def test_target(targets: list[str], roles: set[str], texted_llama: Path, tmp_path: Path) -> None:
    assert adapted(init(texted_llama, "vera", tmp_path / "out", "--json", *flags(target=targets))) == roles
    assert set(adapter_config(tmp_path / "out")["target_modules"]) == roles
