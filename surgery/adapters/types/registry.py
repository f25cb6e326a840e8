"""The registry of adapter types that are read: our table, those of our methods, and those of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.adapters.types.base import AdapterType
from surgery.adapters.types.no_change import NO_CHANGE
from surgery.adapters.types.through_peft import THROUGH_PEFT
from surgery.methods.registry import own_infos, own_types
from surgery.system.registry import Registry

__all__ = ["ADAPTER_TYPES", "readable_types", "type_of"]

# PEFT's type, or PEFT's type and a variant of it that its configuration tells apart.
ADAPTER_TYPES: Registry[AdapterType] = Registry(
    "surgery.adapter_types",
    "adapter type",
    AdapterType,
    {
        name: f"surgery.adapters.types.{module}"
        for name, module in {
            "ADALORA": "adalora:ADALORA",
            "FROD": "frod:FROD",
            "HIRA": "hira:HIRA",
            "IA3": "ia3:IA3",
            "LOHA": "loha:LOHA",
            "LOKR": "lokr:LOKR",
            "LORA": "lora:LORA",
            "LORA.dora": "dora:DORA",
            "RANDLORA": "randlora:RANDLORA",
            "VERA": "vera:VERA",
        }.items()
    },
)


def type_of(config: Mapping[str, Any]) -> AdapterType | None:
    """Return the adapter type of a configuration, by its `peft_type` and variant; None for an unknown one."""
    peft_type = str(config.get("peft_type"))
    named = [name for name in ADAPTER_TYPES.names() if name.partition(".")[0] == peft_type]
    for name in sorted(named, key=lambda name: "." not in name):  # variants first
        entry = ADAPTER_TYPES.get(name)
        if entry is not None and entry.recognises(config):
            return entry
    if peft_type in THROUGH_PEFT:
        return THROUGH_PEFT[peft_type]
    if peft_type in NO_CHANGE or peft_type not in own_types():
        return NO_CHANGE.get(peft_type)
    from surgery.adapters.types.own import own_type  # brings PEFT

    return own_type(peft_type)


def readable_types() -> list[str]:
    """Return the PEFT types whose weight changes are read."""
    return sorted({kind.peft_type for kind in all_types() if kind.readable})


def all_types() -> list[AdapterType]:
    """Return every type: the table's, and those of our methods."""
    from surgery.adapters.types.own import own_type

    own = [own_type(info.peft_type) for info in own_infos()]
    return [*ADAPTER_TYPES, *THROUGH_PEFT.values(), *(kind for kind in own if kind is not None)]
