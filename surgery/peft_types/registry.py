"""Makes our PEFT types known to PEFT."""

from __future__ import annotations

from typing import Any

from surgery.errors import SurgeryError
from surgery.methods.own_types import for_each_method, peft_type_member
from surgery.methods.registry import METHODS, load_formulas, own_infos

__all__ = ["register_types"]


def register_types(_peft: Any = None) -> None:
    """Enter the types of our methods, and of plugins' methods, in PEFT's tables.

    Called once, as soon as both peft and surgery are imported. A plugin that cannot be imported is named in one line.
    """
    for_each_method(_register)
    for info in list(own_infos()):
        try:
            load_formulas(info)
        except Exception as error:
            if not METHODS.is_plugin(info.name):
                raise
            METHODS.leave_out(info.name, error)


def _register(method: Any) -> None:
    """Enter the type of one method, unless PEFT has a type of this name."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from surgery.peft_types.tuner import tuner_class

    configs: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: dict[Any, str] = PEFT_TYPE_TO_PREFIX_MAPPING
    name = method.info.peft_type
    if name in configs:
        raise SurgeryError(f"PEFT has a type {name} already: method {method.info.name} needs another name for its type")
    member = peft_type_member(name)
    configs[member] = method.config_class
    tuners[member] = tuner_class(method)
    prefixes[member] = method.prefix
