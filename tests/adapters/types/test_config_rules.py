"""Configurations: what is left out has PEFT's default, what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest

import surgery
from surgery.adapters.contents import contents_of
from surgery.errors import AdapterError
from tests.helpers.stock_adapters import check_all, saved


def test_what_a_configuration_leaves_out_has_pefts_default(llama: Path, tmp_path: Path) -> None:
    saved(llama, peft.RandLoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    settings = json.loads(path.read_text())
    del settings["randlora_alpha"]
    path.write_text(json.dumps(settings))
    check_all(llama, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha_pattern", {"(": 3}),
        ("alpha_pattern", {"q_proj": "many"}),
        ("rank_pattern", ["q_proj"]),
        ("lora_alpha", None),
        ("lora_alpha", float("inf")),
    ],
)
def test_broken_configurations_are_named(key: str, value: Any, llama: Path, tmp_path: Path) -> None:
    saved(llama, peft.LoraConfig(target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        contents_of(surgery.Adapter.open(tmp_path))
