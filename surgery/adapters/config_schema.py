"""The values that `adapter_config.json` may hold, key by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from surgery.errors import AdapterError

__all__ = ["check_adapter_config"]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and value.isprintable()


def _is_name(value: Any) -> bool:
    return value is None or _is_text(value)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(_is_text(each) for each in value))


def _is_pattern(value: Any) -> bool:
    return _is_name(value) or _are_names(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and abs(value) < 1 << 53)  # NaN is not


def _is_rank(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 24)


def _is_seed(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def _is_width(value: Any) -> bool:
    return _is_rank(value) or _is_text(value)


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_table(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_text(key) for key in value))


def _are_numbers(value: Any) -> bool:
    return _is_table(value) and all(_is_number(each) and each is not None for each in (value or {}).values())


def _are_heights(value: Any) -> bool:
    return _is_table(value) and all(
        isinstance(each, list) and all(_is_rank(height) and height for height in each)
        for each in (value or {}).values()
    )


def _are_layers(value: Any) -> bool:
    return _is_rank(value) or (isinstance(value, list) and all(_is_rank(each) and each is not None for each in value))


# What PEFT's and our own configurations hold under the keys that are read, and what a message calls it.
ADAPTER_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (_is_text, "a name"),
    "task_type": (_is_name, "a name"),
    "base_model_name_or_path": (_is_name, "a name"),
    "revision": (_is_name, "a name"),
    "target_modules": (_is_pattern, "a pattern or a list of names"),
    "exclude_modules": (_is_pattern, "a pattern or a list of names"),
    "layers_pattern": (_is_pattern, "a pattern or a list of names"),
    "modules_to_save": (_are_names, "a list of names"),
    "layers_to_transform": (_are_layers, "a list of numbers"),
    "r": (_is_rank, "a whole number from 0 on"),
    "groups": (_is_rank, "a whole number from 0 on"),
    "variant": (_is_name, "a name"),
    "split": (_are_heights, "an object of lists of heights"),
    "bits": (_is_width, "a number of bits or auto"),
    "sparse_rate": (_is_number, "a number"),
    "store_bases": (_is_switch, "true or false"),
    "save_projection": (_is_switch, "true or false"),
    "use_rslora": (_is_switch, "true or false"),
    "use_dora": (_is_switch, "true or false"),
    "seed": (_is_seed, "a whole number"),
    "projection_prng_key": (_is_seed, "a whole number"),
    "alpha": (_is_number, "a number"),
    "lora_alpha": (_is_number, "a number"),
    "randlora_alpha": (_is_number, "a number"),
    "rank_pattern": (_are_numbers, "an object of numbers"),
    "alpha_pattern": (_are_numbers, "an object of numbers"),
    "packed": (_is_table, "an object of shapes"),
    "base_fingerprint": (_is_table, "an object of digests"),
}


def check_adapter_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check that `adapter_config.json` holds values of the kinds that PEFT writes, under the keys that are read.

    Raises:
        AdapterError: it does not.
    """
    if "peft_type" not in config:
        raise AdapterError(f"{path}: has no peft_type")
    for key, (fits, kind) in ADAPTER_KEYS.items():
        if key in config and not fits(config[key]):
            raise AdapterError(f"{path}: {key} is {config[key]!r:.80}, expected {kind}")
