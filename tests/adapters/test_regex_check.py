"""A pattern that comes with an adapter may not keep anybody waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from surgery.adapters import regex_check as patterns
from surgery.adapters.regex_check import check_patterns
from surgery.errors import AdapterError
from tests.helpers.models import load_base

NAMES = [f"model.layers.{block}.self_attn.{role}_proj" for block in range(80) for role in "qkvo"]
ENDLESS = r"(?:(?:\w+)+\.?)+[^a-z]"


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 2.0)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": "all-linear", "rank_pattern": {}, "alpha_pattern": None, "layers_pattern": ["h", "layers"]},
        {"target_modules": r"model\.layers\.\d+\..*(?:q|k|v)_proj", "rank_pattern": {r".*\.(1|2)\..*": 4}},
        {"target_modules": r"(?i)(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:Q_proj))|(?:\bmodel\.[\d]{1,})"},
        {"target_modules": "(", "exclude_modules": "a{99999999999}"},  # no pattern: PEFT says so
    ],
)
def test_honest_patterns_pass(config) -> None:
    check_patterns(None, config, NAMES)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", ENDLESS),
        ("exclude_modules", ENDLESS),
        ("layers_pattern", ["h", r"(\w+\.?)+!"]),
        ("rank_pattern", {"q_proj": 4, ENDLESS: 8}),
        ("alpha_pattern", {ENDLESS: 8}),
    ],
)
def test_endless_patterns_are_refused_by_name(key: str, value, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"here: {key} holds a pattern") as error:
        check_patterns(Path("here"), {"target_modules": "q_proj", key: value}, NAMES)
    assert repr(ENDLESS) in str(error.value) or "+!" in str(error.value)


@pytest.mark.usefixtures("impatient")
def test_loading_and_pushing_do_not_wait(llama: Path, tmp_path: Path) -> None:
    adapter, _ = surgery.init(llama, "vera", rank=2, target=["q_proj"])
    config = {**adapter.config, "target_modules": f"{ENDLESS}|.*q_proj"}
    surgery.Adapter(config, adapter.tensors, adapter.provenance).save(tmp_path / "endless")
    with pytest.raises(AdapterError, match="target_modules holds a pattern"):
        surgery.load(tmp_path / "endless", load_base(llama))
    with pytest.raises(AdapterError, match="target_modules holds a pattern"):
        surgery.push(tmp_path / "endless", "ada/endless", base_model="ada/base", dry_run=True)
