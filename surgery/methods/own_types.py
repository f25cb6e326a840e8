"""The PEFT types that PEFT knows through surgery only: their enumeration members, and the method of each.

PEFT's tables, and transformers', need a member of a string enumeration for each type, not a bare string. PEFT's own
enumeration is closed, so each of our types is an enumeration of one member, made when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.methods.catalogue import MethodInfo

__all__ = ["add_method", "for_each_method", "peft_type_member"]

_members: dict[str, Enum] = {}
_methods: dict[str, Any] = {}  # PEFT type -> the first `OwnMethod` of that type
_listeners: list[Callable[[Any], None]] = []


def peft_type_member(peft_type: str) -> Any:
    """Return the member of a string enumeration that stands for a PEFT type; always the same one, also when copied."""
    if peft_type not in _members:
        # pickle finds the enumeration again by its name in this module, through `__getattr__`.
        members = {peft_type: peft_type}
        made: Any = Enum(peft_type, members, type=str, module=__name__, qualname=peft_type)  # type: ignore[misc]
        _members[peft_type] = made[peft_type]
    return _members[peft_type]


def __getattr__(name: str) -> Any:
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(peft_type_member(name))


def add_method(info: MethodInfo, method: Any) -> None:
    """Note that a method of a PEFT type of our own has been made; only the first of each type counts."""
    if info.own_type and info.peft_type not in _methods:
        _methods[info.peft_type] = method
        for listener in _listeners:
            listener(method)


def for_each_method(listener: Callable[[Any], None]) -> None:
    """Call `listener` with the method of each PEFT type of our own: of those made already, and of each made later.

    A plugin that imports surgery is half imported while surgery asks for it; its method comes later.
    """
    _listeners.append(listener)
    for method in list(_methods.values()):
        listener(method)
