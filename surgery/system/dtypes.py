"""Floating-point dtypes by the names that users write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from surgery.errors import OptionError

__all__ = ["DTYPES", "FloatDtype", "FloatName", "LoadedDtype", "dtype_name", "dtype_named"]

FloatName = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "fp32", "bf16", "fp16", "fp8"]
# A dtype as callers give it.
FloatDtype = FloatName | torch.dtype
# That of a base model in memory.
LoadedDtype = Literal["float32", "bfloat16", "fp32", "bf16"] | torch.dtype

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name of a dtype, `float32` for `torch.float32` and for `fp32`; what is no known name as it is."""
    name = str(dtype).removeprefix("torch.")
    return SHORT.get(name, name)


def dtype_named(dtype: str | torch.dtype, allowed: Sequence[str]) -> torch.dtype:
    """Return the dtype that a name stands for.

    Args:
        dtype: its name, or itself.
        allowed: the names that the caller can use.

    Raises:
        MethodError: it is none of these.
    """
    name = dtype_name(dtype)
    if name not in allowed:
        raise OptionError(f"unknown dtype {str(dtype)!r}: use {', '.join(allowed)}")
    return DTYPES[name]
