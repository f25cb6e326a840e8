"""Settings of a training: learning rates, and what makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.errors import MethodError
from surgery.methods.registry import info_for_config, method_info, method_infos, training_rate
from tests.helpers.training_trained import QUICK


def test_learning_rates() -> None:
    assert training_rate({"peft_type": "GIVA"}) == method_info("giva").learning_rate
    for variant, name in (("svd", "inilora"), ("alpha", "inilora-alpha"), ("beta", "inilora-beta")):
        assert info_for_config({"peft_type": "INILORA", "variant": variant}) is method_info(name)
    for info in method_infos():
        assert info.learning_rate in (None, info.training_rate), "a published rate is the default"
    assert training_rate({"peft_type": "LORA"}) > 0 and info_for_config({"peft_type": "LORA"}) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": 0}, "max_steps must be at least 1"),
        ({"batch_size": 3, "accumulate": 2}, "batch_size 3 does not divide into 1 processes times 2 parts"),
        ({"lr": 0.0}, "learning_rate must be positive"),
        ({"lr": float("nan")}, "learning_rate must be positive"),
        ({"warmup": 1.0}, "warmup_ratio is a share"),
        ({"cache_teacher": True}, "cache_teacher belongs to a training with a teacher"),
        ({"schedule": "nope"}, "TrainingArguments"),
        ({"arguments": {"nope": 1}}, "TrainingArguments"),
        ({"save_every": 0}, "save_steps must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], reason: str, trained_place: Path) -> None:
    with pytest.raises(MethodError, match=reason):
        surgery.train(
            trained_place / "giva", trained_place / "llama", trained_place / "texts.jsonl", **{**QUICK, **options}
        )
