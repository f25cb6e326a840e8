"""The rows that our types get, and what is counted; PEFT's tests themselves are not here (`make peft-suite`)."""

from __future__ import annotations

import pytest
from peft import IA3Config, LoraConfig, VeraConfig

from surgery.methods.registry import own_types
from tests.peft_suite.outcomes import counted, table
from tests.peft_suite.tables import OURS, rows, type_of

LORA = ("MLP 1 LoRA", "MLP", LoraConfig, {"target_modules": ["a"], "lora_dropout": 0.1, "lora_alpha": 8})


def test_every_type_gets_the_plain_rows_of_lora() -> None:
    dora = ("MLP 2 LoRA", "MLP", LoraConfig, {"target_modules": ["a"], "use_dora": True})
    convolution = ("Conv2d 1 LoRA", "Conv2d", LoraConfig, {"target_modules": ["conv2d"]})
    vera = ("MLP 1 VeRA", "MLP", VeraConfig, {"target_modules": ["a"]})
    found = rows([LORA, dora, convolution, ("MLP 1 IA3", "MLP", IA3Config, {}), vera])
    assert set(OURS.values()) == own_types()
    assert found[:2] == [LORA, vera]
    assert [row[2] for row in found[2:]] == list(OURS)
    for name, _, config_class, options in found[2:]:
        assert name == f"MLP 1 {OURS[config_class]}"
        assert {"target_modules": ["a"], "dropout": 0.1}.items() <= options.items() and "lora_alpha" not in options
        assert config_class(**options).dropout == 0.1


def test_other_tables_come_back_whole() -> None:
    assert rows([True, False]) == [True, False]
    assert rows(["one", "two"], left_out=["two"]) == ["one"]
    assert rows([LoraConfig, IA3Config]) == [LoraConfig, *OURS]
    assert type_of([True, LoraConfig]) == "LORA" and type_of([True]) is None


@pytest.mark.parametrize(
    ("said", "counts"), [("AssertionError: no", "0 | 1 | 0"), ("emb is not a linear layer", "0 | 0 | 1")]
)
def test_counts(said: str, counts: str) -> None:
    outcomes = {"t": {"type": "SMOA", "outcome": "failed", "said": said}}
    assert f"| SMOA | {counts} |" in table(counted(outcomes), 5)
    passed = {"t": {"type": "SMOA", "outcome": "passed", "said": ""}}
    assert "| SMOA | 1 | 0 | 0 |" in table(counted(passed), 5)
