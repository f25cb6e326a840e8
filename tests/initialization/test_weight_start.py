"""Ranks of a start: those above the layers are capped, those that no layer limits are free."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from tests.helpers.command_line import invoke

CAPPED = {"inilora": [], "inilora-alpha": [], "inilora-beta": [], "smoa": ["--variant", "components"]}


@pytest.mark.parametrize("method", CAPPED)
def test_rank_above_the_layers_is_capped(method: str, llama: Path, tmp_path: Path) -> None:
    more = CAPPED[method]
    result = invoke("init", llama, "--method", method, *more, "--rank", 1000, "-o", tmp_path / "out", "-v")
    assert result.exit_code == 0
    assert result.stderr.startswith("Note: rank 1000 is capped at min(in, out) in 21 of 21 layers (down to 16)\n")
    options = {"variant": more[1]} if more else {}
    _, report = surgery.init(llama, method, rank=20, dry_run=True, **options)
    assert {site.module.split(".")[-1]: site.rank for site in report.sites[:7]} == {
        "q_proj": 20, "k_proj": 16, "v_proj": 16, "o_proj": 20, "gate_proj": 20, "up_proj": 20, "down_proj": 20,
    }  # fmt: skip


def test_rank_of_smoas_blocks_is_free(llama: Path, tmp_path: Path) -> None:
    result = invoke("init", llama, "--method", "smoa", "--variant", "blocks", "--rank", 100, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr.startswith("Note: blocks of 21 of 21 layers have fewer rows or columns than their rank")
    tensors = surgery.Adapter.open(tmp_path / "out").modules["model.layers.0.self_attn.k_proj"]
    assert tensors["smoa_A"].shape == (100, 16) and tensors["smoa_B"].shape == (8, 100)


def test_rank_of_vera_is_free(llama: Path, tmp_path: Path) -> None:
    result = invoke("init", llama, "--method", "vera", "--rank", 1000, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr == ""
    tensors = surgery.Adapter.open(tmp_path / "out").modules
    assert tensors["model.layers.0.self_attn.q_proj"]["vera_lambda_d"].shape == (1000,)
