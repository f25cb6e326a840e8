"""Where tensors are computed."""

from __future__ import annotations

import os
from typing import Literal

import torch

from surgery.errors import OptionError

__all__ = ["Device", "resolve_device", "working_devices"]

# A device as callers give it; text also as in `cuda:1`.
Device = Literal["auto", "cpu", "cuda"] | str | torch.device


def working_devices(device: torch.device) -> list[torch.device]:
    """The devices that share out work: all visible GPUs where none is named by its number, else the one.

    Under `torchrun` every process has its own.
    """
    if device.type != "cuda" or device.index is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def resolve_device(name: Device) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda:1`, ... or a `torch.device`; `auto` is `cuda`, or else the CPU.

    Raises:
        MethodError: there is no such device, or it lacks double precision.
    """
    if isinstance(name, str) and name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "mps":
        raise OptionError("device mps has no double precision, which the decompositions need: use --device cpu")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise OptionError(f"device {name} is not available here: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type not in {"cpu", "cuda"}:
        raise OptionError(f"device {name} is not supported: use auto, cpu, cuda or cuda:N")
    return device
