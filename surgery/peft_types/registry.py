"""Makes our PEFT types known to PEFT."""

from __future__ import annotations

from typing import Any

__all__ = ["register_types"]


def register_types(_peft: Any = None) -> None:
    """Enter our types in PEFT's tables. Called once, as soon as both peft and surgery are imported."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from surgery.methods.base import OwnMethod, OwnType
    from surgery.methods.catalogue import OWN_TYPES
    from surgery.methods.registry import method_for_type
    from surgery.peft_types.tuner import tuner_class

    configs: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: dict[Any, str] = PEFT_TYPE_TO_PREFIX_MAPPING
    for peft_type in OWN_TYPES:
        member = OwnType(peft_type)
        method = method_for_type(peft_type)
        assert isinstance(method, OwnMethod)
        configs[member] = method.config_class
        tuners[member] = tuner_class(peft_type)
        prefixes[member] = method.prefix
