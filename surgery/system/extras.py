"""Packages that only some commands need, which come with an extra of ours."""

from __future__ import annotations

import importlib
from typing import Any

from surgery.errors import SurgeryError

__all__ = ["DISTRIBUTION", "extra_package"]

DISTRIBUTION = "adapter-surgery"
# Package -> the extra that brings it.
EXTRAS = {"datasets": "train", "gguf": "gguf", "matplotlib": "plot", "PIL": "train"}


def extra_package(module: str, purpose: str, error: type[SurgeryError]) -> Any:
    """Import a module of a package that an extra brings.

    Args:
        module: the module, such as `matplotlib.figure`.
        purpose: what needs the package, as the message begins.
        error: the error's class.

    Raises:
        SurgeryError: of this class; the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != package:
            raise
        extra = EXTRAS[package]
        raise error(
            f"{purpose} needs the package {package}: pip install '{DISTRIBUTION}[{extra}]', or pip install {package}"
        ) from None
