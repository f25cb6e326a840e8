"""Importing peft before those of our modules that use it.

As soon as peft is imported, our types are entered in its tables, and that imports most of our modules. None of them may
be half imported at that time; so peft is imported before the first of them is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["import_peft_first"]

PACKAGES = ("surgery.adapters.", "surgery.methods.", "surgery.peft_types.")
# Their modules that do not import peft, nor another module that does: who only looks at files does without it.
LIGHT = frozenset(
    {
        *(
            f"surgery.adapters.{name}"
            for name in (
                "adapter", "companions", "completeness", "config_schema", "contents", "experts", "foreign_formats",
                "format_registry", "inner_folders", "lacking", "named_tensors", "names", "packing", "regex_check",
                "tokens", "types", "wrapper_names",
            )
        ),
        *(
            f"surgery.adapters.types.{name}"
            for name in (
                "adalora", "base", "config_rules", "dora", "hira", "ia3", "loha", "lokr", "lora", "no_change",
                "patterns", "randlora", "refused", "registry", "tensor_checks", "through_peft",
            )
        ),
        "surgery.methods.catalogue",
        "surgery.methods.own_types",
        "surgery.methods.registry",
        "surgery.peft_types.registry",
    }
)  # fmt: skip


class _PeftFirst(MetaPathFinder):
    """Imports peft when a module that uses it is looked for; finds that module only where peft has brought it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if "peft" in sys.modules or not fullname.startswith(PACKAGES) or fullname in LIGHT:
            return None
        importlib.import_module("peft")
        imported = sys.modules.get(fullname)
        if imported is None:
            return None
        spec = ModuleSpec(fullname, _Imported(imported))
        imported.__spec__ = spec  # Python takes the module's own spec, by which it would execute it again
        return spec


class _Imported(Loader):
    """Gives the module that was imported meanwhile, so that it is not executed a second time."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def import_peft_first() -> None:
    """Import peft, from now on, before any of our modules that use it."""
    if not any(isinstance(finder, _PeftFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFirst())
