"""Configurations of adapters: a value of another kind is named with its key, common or the type's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

from surgery.adapters.config_schema import check_adapter_config
from surgery.adapters.types.registry import readable_types
from surgery.errors import AdapterError

PLACE = Path("folder/adapter_config.json")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "has no peft_type"),
        ({"peft_type": 5}, "peft_type is 5"),
        ({"peft_type": "LORA", "target_modules": 5}, "target_modules is 5"),
        ({"peft_type": "LORA", "lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"peft_type": "VERA", "projection_prng_key": "x"}, "projection_prng_key is 'x'"),
    ],
)
def test_a_value_of_another_kind_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=f"{PLACE}: {words}"):
        check_adapter_config(PLACE, config)


def test_what_peft_writes_passes() -> None:
    known = {name: peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(name) for name in readable_types()}
    assert known["LORA"] and known["VERA"]
    for name, config in known.items():
        if config is not None:
            settings = config(total_step=9) if name == "ADALORA" else config()
            check_adapter_config(PLACE, {**settings.to_dict(), "peft_type": name})
