"""A pattern that comes with an adapter may not keep anybody waiting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import surgery
from surgery.adapters import regex_check as patterns
from surgery.adapters.regex_check import check_patterns
from surgery.errors import AdapterError
from tests.helpers.models import load_base

NAMES = [f"model.layers.{block}.self_attn.{role}_proj" for block in range(80) for role in "qkvo"]
ENDLESS = r"(?:(?:\w+)+\.?)+[^a-z]"


# As trainers and their users write them.
HONEST = {
    "wildcards": r"(?:.*?(?:vision|language|text).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:qkv|out_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}(?!.*\.experts\.\d)\..*?(?:self_attn|mlp).*?\.(?:(?:q_proj|v_proj)))",
    "lookahead": r"^(?!.*visual).*(?:q_proj|k_proj|v_proj).*",
    "lookbehind": r"(.*x_embedder|.*(?<!single_)blocks\.[0-9]+\.norm1\.linear|.*(?<!single_)blocks\.[0-9]+\.to_k)",
    "optional": r"model\.layers\.[\d]+\.(_checkpoint_wrapped_module\.)?(mlp|self_attn)\.(up|down|gate|q|k|v|o)_proj",
    "words": r"(?:\w+\.)+(?:q|k)_proj",
    "parts": r"([^.]+\.)*q_proj",
    "case": r"(?i).*Q_PROJ",
    "names": "^(?:" + "|".join(re.escape(f"h.{block}.{role}") for block in range(200) for role in NAMES[:4]) + ")$",
}
# Each keeps `re` busy for hours on one name, most of them without keeping the package `regex` for a millisecond.
ENDLESS_PATTERNS = {
    "nested": r"(a+)+$",
    "nested-lazily": r"(?:(?:\w+?)+?\.?)+?[^a-z]",
    "nested-star": r"(.*)*x",
    "nested-counts": r"((a{1,9}){1,9}){1,9}",
    "possessive": r"(a++)*b",
    "atomic": r"(?>(a+)+b)",
    "lookahead": r"(?=(a+)+b)",
    "reference": r"(.)\1*(\1+)*x",
    "alternatives": r"(a|a)*$",
    "alternatives-in-a-row": "(?:a|ab?)" * 40,
    "alternatives-counted": "(?:a|aa|aaa){40}",
    "empty-alternatives": "(|){40}x",
    "optional-in-a-row": "a?" * 40 + "a" * 40,
    "wildcards": ".*" * 12 + "x",
    "wildcards-by-alternatives": ".*" * 6 + "(?:" + "|".join(f"{number:05}" for number in range(20_000)) + ")x",
    "depth": "(" * 5_000 + "a+" + ")+" * 5_000,
    "length": "a|" * 2_000_001,
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": "all-linear", "rank_pattern": {}, "alpha_pattern": None, "layers_pattern": ["h", "layers"]},
        {"target_modules": r"model\.layers\.\d+\..*(?:q|k|v)_proj", "rank_pattern": {r".*\.(1|2)\..*": 4}},
        {"target_modules": ["(a+)+$"]},  # in a list PEFT reads names
        {"target_modules": "(", "exclude_modules": "a{99999999999}"},  # no pattern: PEFT says so
        *({"target_modules": pattern} for pattern in HONEST.values()),
    ],
)
def test_honest_patterns_pass(config) -> None:
    check_patterns(None, config, NAMES)


@pytest.mark.parametrize("kind", ENDLESS_PATTERNS)
def test_endless_patterns_are_refused_at_once(kind: str) -> None:
    with pytest.raises(AdapterError, match="target_modules holds a pattern") as error:
        check_patterns(None, {"target_modules": ENDLESS_PATTERNS[kind]}, NAMES)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", ENDLESS),
        ("exclude_modules", ENDLESS),
        ("feedforward_modules", ENDLESS),
        ("layers_pattern", ["h", r"(\w+\.?)+!"]),
        ("modules_to_save", ["head", r"(\w+\.?)+!"]),
        ("rank_pattern", {"q_proj": 4, ENDLESS: 8}),
        ("alpha_pattern", {ENDLESS: 8}),
    ],
)
def test_endless_patterns_are_refused_by_name(key: str, value) -> None:
    with pytest.raises(AdapterError, match=f"here: {key} holds a pattern") as error:
        check_patterns(Path("here"), {"target_modules": "q_proj", key: value}, NAMES)
    assert repr(ENDLESS) in str(error.value) or "+!" in str(error.value)


def test_many_names_are_tried_against_the_clock(monkeypatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.0)
    with pytest.raises(AdapterError, match="takes longer than 0 s"):
        check_patterns(None, {"target_modules": HONEST["wildcards"]}, NAMES)


def test_loading_and_pushing_do_not_wait(llama: Path, tmp_path: Path) -> None:
    adapter, _ = surgery.init(llama, "vera", rank=2, target=["q_proj"])
    config = {**adapter.config, "target_modules": f"{ENDLESS}|.*q_proj"}
    surgery.Adapter(config, adapter.tensors, adapter.provenance).save(tmp_path / "endless")
    with pytest.raises(AdapterError, match="target_modules holds a pattern"):
        surgery.load(tmp_path / "endless", load_base(llama))
    with pytest.raises(AdapterError, match="target_modules holds a pattern"):
        surgery.push(tmp_path / "endless", "ada/endless", base_model="ada/base", dry_run=True)
