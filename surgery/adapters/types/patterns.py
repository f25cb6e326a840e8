"""Numbers that a configuration gives to single layers, and ranks and scales that follow from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgery.deltas.operators import LowRank
from surgery.errors import AdapterError
from surgery.system.tensors import TensorMap

__all__ = ["factor_pair", "number_of", "pattern_value", "rank_scale"]


def pattern_value(config: Mapping[str, Any], key: str, module: str, default: Any) -> float:
    """Return the number that a layer has by `rank_pattern` or `alpha_pattern`, by PEFT's own rule of matching.

    Raises:
        AdapterError: a pattern is no valid expression, or the value is no finite number.
    """
    patterns = config.get(key) or {}
    try:
        value = patterns.get(_matching_key(patterns, module), default)
        number = float(value)
    except (re.error, AttributeError, TypeError, ValueError):
        raise AdapterError(f"{module}: adapter_config.json has no usable {key} ({patterns!r:.80})") from None
    if not 0 <= abs(number) < float("inf"):
        raise AdapterError(f"{module}: adapter_config.json gives {value!r} ({key}), which is not finite")
    return number


def _matching_key(patterns: Mapping[str, Any], module: str) -> str:
    if not patterns:
        return module
    from peft.utils.other import get_pattern_key  # only here: importing peft takes seconds

    return get_pattern_key(list(patterns), module)


def factor_pair(module: str, tensors: TensorMap, B_name: str, A_name: str) -> LowRank:
    """Return `B A` of two tensors of a layer.

    Raises:
        AdapterError: they are no pair of factors.
    """
    B, A = tensors[B_name], tensors[A_name]
    if B.shape[1] != A.shape[0]:
        raise AdapterError(f"{module}: {B_name} {tuple(B.shape)} and {A_name} {tuple(A.shape)} are no pair of factors")
    return LowRank(B, A)


def rank_scale(config: Mapping[str, Any], module: str) -> float:
    """Return `alpha / r` of one layer, both by its patterns.

    Raises:
        AdapterError: the rank is not positive.
    """
    rank = pattern_value(config, "rank_pattern", module, config.get("r", 8))
    if not rank > 0:
        raise AdapterError(f"{module}: adapter_config.json says rank {rank:g}")
    return pattern_value(config, "alpha_pattern", module, config.get("alpha", 8)) / rank


def number_of(config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of the configuration.

    Raises:
        AdapterError: it is none, or not finite.
    """
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise AdapterError(f"adapter_config.json has {key} {value!r}, expected a number")
    return float(value)
