"""The registry of methods: our own, and those that installed packages add."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.methods.catalogue import METHODS, method_info

__all__ = ["method_for_type", "method_named"]
if TYPE_CHECKING:
    from surgery.methods.base import Method


def method_named(name: str) -> Method:
    """The method called `name`, with its formulas."""
    return method_info(name).load()


def method_for_type(peft_type: str) -> Method | None:
    """The method that understands adapters of a PEFT type, or None."""
    for info in METHODS.values():
        if info.peft_type == peft_type:
            return info.load()
    return None
