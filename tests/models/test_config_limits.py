"""Configurations that would stop a library with something else than a named error, or keep it busy for hours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from surgery.adapters.config_schema import check_adapter_config
from surgery.errors import AdapterError, CheckpointError
from surgery.models.config_limits import check_model_config

CONFIG = Path("folder/config.json")
BEYOND_FLOAT = 10**400


@pytest.mark.parametrize("value", [[], {}, 5, "pytorch_model.bin"])
def test_weights_under_another_name_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="transformers_weights"):
        check_model_config(CONFIG, {"transformers_weights": value}, False)


@pytest.mark.parametrize("name", [None, "model.safetensors", "model.safetensors.index.json"])
def test_control_weights_under_their_own_name_are_not(name: str | None) -> None:
    check_model_config(CONFIG, {"transformers_weights": name}, False)


@pytest.mark.parametrize(
    "depths",
    [[2, 2, 10**9, 2], [2, 2, 1e9, 2], [9000] * 9000, [BEYOND_FLOAT, 1.5], [float("nan")], [-(10**9)], [[2], [10**9]]],
)
def test_more_layers_than_any_model_has_in_stages(depths: list[Any]) -> None:
    """Swin makes a list of so many numbers before it makes a module."""
    for config in ({"depths": depths}, {"vision_config": {"encoder_depths": depths}}, {"stages": [{"depth": depths}]}):
        with pytest.raises(CheckpointError, match=r"depth.* more than any model has") as caught:
            check_model_config(CONFIG, config, False)
        assert len(str(caught.value)) < 200


def test_control_stages_of_real_models_are_not_refused() -> None:
    for config in (transformers.SwinConfig(), transformers.ConvNextConfig(), transformers.LevitConfig()):
        check_model_config(CONFIG, config.to_dict(), False)
    check_model_config(CONFIG, {"layer_rope_theta": [500_000.0] * 48, "ffn_dims_by_layer": [14_336] * 80}, False)


WRONG: list[tuple[str, Any]] = [
    ("bits", []),
    ("bits", {}),
    ("bits", -1),
    ("rank_pattern", {"q_proj": "many"}),
    ("rank_pattern", {"q_proj": BEYOND_FLOAT}),
    ("alpha_pattern", {"q_proj": BEYOND_FLOAT}),
    ("alpha_pattern", {"q_proj": None}),
    ("alpha_pattern", {"q_proj": float("nan")}),
    ("randlora_alpha", BEYOND_FLOAT),
    ("split", {"q_proj": "parts"}),
    ("split", {"q_proj": 3}),
    ("split", {"q_proj": None}),
    ("split", {"q_proj": [8, "8"]}),
    ("split", {"q_proj": [8, None]}),
    ("split", {"q_proj": [16, 0]}),
    ("split", {"q_proj": [-8, 24]}),
]


def type_with(key: str) -> str:
    """The PEFT type whose configurations have a key."""
    return "RANDLORA" if key == "randlora_alpha" else "GIVA"


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_value_of_another_kind_is_named(key: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=f"folder/config.json: {key} is .*, expected a"):
        check_adapter_config(CONFIG, {"peft_type": type_with(key), key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", "auto"),
        ("bits", 4),
        ("bits", None),
        ("rank_pattern", {}),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 0.5}),
        ("randlora_alpha", 640),
        ("split", None),
        ("split", {"c_attn": [32, 32, 32]}),
    ],
)
def test_control_values_that_are_written(key: str, value: Any) -> None:
    check_adapter_config(CONFIG, {"peft_type": type_with(key), key: value})
