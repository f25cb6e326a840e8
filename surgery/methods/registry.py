"""The registry of methods: our own, and those that installed packages add through entry points.

Everybody looks up methods here: by name, by PEFT type, by an adapter's configuration. Importing this module imports
neither torch nor peft, and names are known without importing a plugin.

A plugin names a `MethodInfo` in the entry point group `surgery.methods`, by the name of the method:

    [project.entry-points."surgery.methods"]
    my-method = "my_package.my_method:INFO"
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from surgery.errors import MethodError
from surgery.methods.catalogue import MethodInfo
from surgery.system.registry import Registry

if TYPE_CHECKING:
    from surgery.methods.base import Method

__all__ = [
    "METHODS",
    "info_for_config",
    "info_for_type",
    "load_formulas",
    "method_for_type",
    "method_info",
    "method_infos",
    "method_named",
    "method_names",
    "own_infos",
    "own_types",
    "training_rate",
]

_OURS = ("vera", "giva", "inilora", "inilora-alpha", "inilora-beta", "frod", "smoa")
METHODS: Registry[MethodInfo] = Registry(
    "surgery.methods",
    "method",
    MethodInfo,
    {name: f"surgery.methods.catalogue:{name.upper().replace('-', '_')}" for name in _OURS},
)

# What `surgery train` takes for the types that no method makes.
STOCK_RATES = {"LORA": 5e-4}
STOCK_RATE = 1e-3


def method_names() -> list[str]:
    """Return the names of all methods, our own first, without importing a plugin."""
    return METHODS.names()


def method_infos() -> list[MethodInfo]:
    """Return the rows of all methods, our own first; imports the plugins' modules."""
    return list(METHODS)


def method_info(name: str) -> MethodInfo:
    """Return the row called `name`.

    Raises:
        MethodError: there is none.
    """
    info = METHODS.get(name)
    if info is None:
        raise MethodError(f"unknown method {name!r}; the methods are {', '.join(method_names())}")
    return info


def info_for_type(peft_type: str) -> MethodInfo | None:
    """Return the first row whose adapters are of a PEFT type, or None."""
    return next((info for info in METHODS if info.peft_type == peft_type), None)


def info_for_config(config: Mapping[str, Any]) -> MethodInfo | None:
    """Return the row of the method that made an adapter, by its `adapter_config.json`; None for none of ours."""
    peft_type, variant = config.get("peft_type"), config.get("variant")
    rows = [info for info in METHODS if info.peft_type == peft_type]
    if len(rows) < 2:
        return rows[0].of_variant(variant or rows[0].unnamed_variant) if rows else None
    return next((info for info in rows if variant is not None and info.name.endswith(f"-{variant}")), rows[0])


def own_infos() -> Iterator[MethodInfo]:
    """Yield one row for each PEFT type that PEFT knows through surgery only."""
    seen: set[str] = set()
    for info in METHODS:
        if info.own_type and info.peft_type not in seen:
            seen.add(info.peft_type)
            yield info


def own_types() -> frozenset[str]:
    """Return the PEFT types that PEFT knows through surgery only."""
    return frozenset(info.peft_type for info in own_infos())


def training_rate(config: Mapping[str, Any]) -> float:
    """Return the learning rate that `surgery train` takes for an adapter, by its `adapter_config.json`."""
    info = info_for_config(config)
    return info.training_rate if info is not None else STOCK_RATES.get(str(config.get("peft_type")), STOCK_RATE)


def load_formulas(info: MethodInfo) -> Method:
    """Import and return the formulas of a method; this imports torch and peft.

    Raises:
        MethodError: the module has no method of this name.
    """
    methods: Mapping[str, Method] = importlib.import_module(info.module).METHODS
    if info.name not in methods:
        raise MethodError(f"method {info.name}: {info.module}.METHODS has no {info.name!r}, only {', '.join(methods)}")
    return methods[info.name]


def method_named(name: str) -> Method:
    """Return the method called `name`, with its formulas.

    Raises:
        MethodError: there is none.
    """
    return load_formulas(method_info(name))


def method_for_type(peft_type: str) -> Method | None:
    """Return the method that understands adapters of a PEFT type, or None."""
    info = info_for_type(peft_type)
    return load_formulas(info) if info is not None else None
