"""Rules for the values of `adapter_config.json`, key by key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["COMMON_RULES", "OWN_RULES", "Rule"]

# A check of a value, and the noun phrase for what is expected.
Rule = tuple[Callable[[Any], bool], str]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and value.isprintable()


def is_name(value: Any) -> bool:
    return value is None or is_text(value)


def are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(is_text(each) for each in value))


def is_pattern(value: Any) -> bool:
    return is_name(value) or are_names(value)


def is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and abs(value) < 1 << 53)  # NaN is not


def is_rank(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 24)


def is_seed(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def is_width(value: Any) -> bool:
    return is_rank(value) or is_text(value)


def is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def is_table(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(is_text(key) for key in value))


def are_numbers(value: Any) -> bool:
    return is_table(value) and all(is_number(each) and each is not None for each in (value or {}).values())


def are_texts(value: Any) -> bool:
    return is_table(value) and all(is_text(each) for each in (value or {}).values())


def are_heights(value: Any) -> bool:
    return is_table(value) and all(
        isinstance(each, list) and all(is_rank(height) and height for height in each) for each in (value or {}).values()
    )


def are_ranks(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(is_rank(each) and each is not None for each in value))


def are_layers(value: Any) -> bool:
    return is_rank(value) or are_ranks(value)


A_NAME = (is_name, "a name")
A_PATTERN = (is_pattern, "a pattern or a list of names")
A_RANK = (is_rank, "a whole number from 0 on")
A_NUMBER = (is_number, "a number")
A_SEED = (is_seed, "a whole number")
A_SWITCH = (is_switch, "true or false")
NUMBERS = (are_numbers, "an object of numbers")

# The keys of every type, and those that several types share.
COMMON_RULES: dict[str, Rule] = {
    "peft_type": (is_text, "a name"),
    "task_type": A_NAME,
    "base_model_name_or_path": A_NAME,
    "revision": A_NAME,
    "target_modules": A_PATTERN,
    "exclude_modules": A_PATTERN,
    "layers_pattern": A_PATTERN,
    "modules_to_save": (are_names, "a list of names"),
    "target_parameters": (are_names, "a list of names"),
    "auto_mapping": (is_table, "an object"),
    "bias": A_NAME,
    "layers_to_transform": (are_layers, "a list of numbers"),
    "r": A_RANK,
    "alpha": A_NUMBER,
    "rank_pattern": NUMBERS,
    "alpha_pattern": NUMBERS,
    "variant": A_NAME,
    "seed": A_SEED,
}
# The keys of our own types.
OWN_RULES: dict[str, Rule] = {
    "groups": A_RANK,
    "branch_ranks": (are_ranks, "a list of whole numbers"),
    "lora_alpha": A_NUMBER,
    "split": (are_heights, "an object of lists of heights"),
    "bits": (is_width, "a number of bits or auto"),
    "sparse_rate": A_NUMBER,
    "store_bases": A_SWITCH,
    "packed": (is_table, "an object of shapes"),
    "gains": (are_texts, "an object of rows, outputs or inputs"),
    "kinds": (are_texts, "an object of kinds of layers"),
    "base_fingerprint": (is_table, "an object of digests"),
}
