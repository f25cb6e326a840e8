"""Checks of an adapter's tensors that hold for every type: real, floating point, finite."""

from __future__ import annotations

import math

import torch

from surgery.errors import AdapterError
from surgery.system.threads import one_torch_thread

__all__ = ["check_finite", "is_finite"]

# Elements that are checked at a time, so that a large head is not copied whole.
CHUNK = 1 << 20


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor is real, floating point, and finite.

    Raises:
        AdapterError: it is not.
    """
    if tensor.is_complex():
        raise AdapterError(f"{name} is {tensor.dtype}: no adapter has complex numbers")
    if not tensor.is_floating_point():
        raise AdapterError(
            f"{name} is {tensor.dtype}, not floating point: a quantised adapter is not read; give it in float32 or "
            "half precision"
        )
    if not is_finite(tensor):
        raise AdapterError(f"{name} holds NaN or Inf: the training diverged, or the file is broken")


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all elements are finite."""
    parts = tensor.detach().reshape(-1).split(CHUNK) if tensor.numel() else ()
    with one_torch_thread():
        # Extremes show NaN as well as Inf, and need no mask.
        return all(math.isfinite(float(end)) for part in parts for end in torch.aminmax(part.float()))
