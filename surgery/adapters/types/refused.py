"""Types of adapters that are recognised and refused, each for its own reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.adapters.types.base import AdapterFile, AdapterType, BaseWeights, Changes, Needs
from surgery.errors import AdapterError
from surgery.system.tensors import TensorMap

__all__ = ["RefusedType"]


class RefusedType(AdapterType):
    """A type whose weight change cannot be read from its file.

    Args:
        peft_type: the `peft_type` of its configuration.
        title: its name in its paper.
        paper: where it was published.
        reason: why it is refused, and the remedy.
        opened_as: see `AdapterType`.
    """

    def __init__(
        self, peft_type: str, title: str, paper: str | None, reason: str, opened_as: str | None = None
    ) -> None:
        self.peft_type, self.title, self.paper, self.reason = peft_type, title, paper, reason
        self.opened_as = opened_as

    @property
    def readable(self) -> bool:
        return False

    def refuse(self, config: Mapping[str, Any], label: str) -> None:
        raise AdapterError(f"{label}: {self.reason}")

    def needs(self, config: Mapping[str, Any]) -> Needs:
        return Needs.VALUES

    def short_name(self, stem: str) -> tuple[str, str] | None:
        return None

    def check_layer(self, config: Mapping[str, Any], module: str, tensors: TensorMap) -> None:
        raise AdapterError(f"{module}: {self.reason}")

    def changes(self, file: AdapterFile, base: BaseWeights | None) -> Changes:
        raise AdapterError(f"{file.label}: {self.reason}")
