"""Tables of named entries: our own, and those that installed packages add through an entry point group.

Names are known without importing anything; an entry is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from surgery.errors import SurgeryError, first_line

__all__ = ["Registry"]

E = TypeVar("E")


class Registry(Generic[E]):
    """Entries by name.

    Args:
        group: the entry point group by which other packages add entries.
        kind: the noun for one entry in messages, such as "method".
        entry_type: the class of every entry.
        builtin: name -> `module:attribute` of our own entries.
    """

    def __init__(self, group: str, kind: str, entry_type: type[Any], builtin: Mapping[str, str]) -> None:
        self.group, self.kind, self.entry_type = group, kind, entry_type
        self._builtin = dict(builtin)
        self._loaded: dict[str, E] = {}
        self._added: dict[str, EntryPoint] | None = None
        self._broken: set[str] = set()

    def names(self) -> list[str]:
        """Return the names of all entries, our own first; a plugin that turned out to be broken is left out."""
        return [name for name in (*self._builtin, *self._plugins()) if name not in self._broken]

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[E]:
        """Import and yield all entries. A plugin that cannot be imported is named in one line and left out."""
        for name in self.names():
            entry = self.get(name)
            if entry is not None:
                yield entry

    def get(self, name: str) -> E | None:
        """Return the entry of this name; None where there is none, or where it cannot be imported."""
        if name not in self._loaded and name in self.names():
            if name in self._builtin:
                self._loaded[name] = _imported(self._builtin[name])
            else:
                self._load_plugin(name, self._plugins()[name])
        return self._loaded.get(name)

    def leave_out(self, name: str, error: BaseException) -> None:
        """Name an entry of a plugin that cannot be used in one line, and leave it out from now on."""
        point = self._plugins()[name]
        self._broken.add(name)
        self._loaded.pop(name, None)
        package = point.dist.name if point.dist is not None else point.value
        logging.getLogger("surgery").warning(
            "%s: the %s %r cannot be imported and is left out (%s)", package, self.kind, name, first_line(error)
        )

    def is_plugin(self, name: str) -> bool:
        """Return whether another package adds the entry of this name."""
        return name in self._plugins()

    def _plugins(self) -> dict[str, EntryPoint]:
        if self._added is None:
            found = entry_points(group=self.group)
            self._added = {point.name: point for point in found if point.name not in self._builtin}
        return self._added

    def _load_plugin(self, name: str, point: EntryPoint) -> None:
        if _half_imported(point.module):
            return  # it is what imports us, and will be there later
        try:
            entry = point.load()
            if not isinstance(entry, self.entry_type):
                raise SurgeryError(f"{point.value} is a {type(entry).__name__}, not a {self.entry_type.__name__}")
        except Exception as error:  # of another package's code: it costs that package's entry, nothing else
            self.leave_out(name, error)
        else:
            self._loaded[name] = entry


def _half_imported(module: str) -> bool:
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _imported(address: str) -> Any:
    module, _, attribute = address.partition(":")
    return getattr(importlib.import_module(module), attribute)
