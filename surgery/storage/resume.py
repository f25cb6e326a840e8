"""Finished parts of a long run, kept on the disk so that a run which was killed goes on where it stopped.

A part holds units (the tensors of a layer, say, and what is to be known of them) in one safetensors file, which carries
its checksum in its name and appears whole or not at all. Units wait in memory until they are worth a file: a short run
writes none, a long one loses little and holds little.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from surgery.storage.safetensors_read import UNREADABLE, file_identity
from surgery.storage.safetensors_write import DTYPE_OF_CODE, Tensor, read_header
from surgery.version import __version__

__all__ = ["PartTensors", "Parts", "file_identities", "run_key"]

# Units are written when they take so many bytes, or when so many seconds have gone since the last ones were.
BYTES, SECONDS = 1 << 24, 5.0
SUFFIX = ".safetensors"
CHUNK = 1 << 24
FORMAT = 1
# What may change the last bits of a result.
LIBRARIES = ("torch", "scipy", "numpy", "transformers", "peft")


@dataclass
class _Unit:
    """One unit: what is to be known of it, its tensors where they wait, or the file that has them and where."""

    facts: dict[str, Any]
    names: tuple[str, ...]
    waiting: dict[str, torch.Tensor] = field(default_factory=dict)
    path: Path | None = None
    places: dict[str, Tensor] = field(default_factory=dict)


class Parts:
    """Named units of finished work. Threads may share it.

    Args:
        place: a block in which the folder of the files is written to; entered when there is a file to write. Without
            it all units stay in memory.
        folder: the folder; what is in it already is taken in by `look`.
        key: what recognises the run; a process of another one, which has outlived it, may still write to the folder.
    """

    def __init__(
        self,
        place: Callable[[], AbstractContextManager[Path]] | None = None,
        folder: Path | None = None,
        key: str = "",
    ) -> None:
        self._place, self._folder, self._key = place, folder, key
        self._known: set[Path] = set()
        self._units: dict[str, _Unit] = {}
        self._lock = threading.RLock()
        self._size = 0
        self._written = time.monotonic()

    def __contains__(self, name: object) -> bool:
        return name in self._units

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._units))

    @property
    def on_disk(self) -> bool:
        """Whether any unit is in a file."""
        return any(unit.path is not None for unit in self._units.values())

    def add(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Take in a finished unit.

        Args:
            name: of the unit.
            tensors: on the CPU, contiguous, each with memory of its own.
            facts: what JSON can hold.

        Raises:
            OutputError: the disk does not take it.
        """
        with self._lock:
            self._units[name] = _Unit(dict(facts or {}), tuple(tensors), dict(tensors))
            self._size += sum(tensor.nbytes for tensor in tensors.values())
            if self._size >= BYTES or time.monotonic() - self._written >= SECONDS:
                self.flush()

    def facts(self, name: str) -> dict[str, Any]:
        """What is to be known of a unit."""
        return self._units[name].facts

    def names(self, name: str) -> tuple[str, ...]:
        """The names of a unit's tensors."""
        return self._units[name].names

    def tensor(self, name: str, tensor: str) -> torch.Tensor:
        """One tensor of a unit; from a file it is a view, which ends the mapping when it goes."""
        unit = self._units[name]
        return unit.waiting[tensor] if unit.path is None else _mapped(unit.path, unit.places[tensor])

    def shape(self, name: str, tensor: str) -> torch.Tensor:
        """One tensor of a unit on the meta device; its file is not opened, and may be gone."""
        unit = self._units[name]
        if unit.path is None:
            return torch.empty_like(unit.waiting[tensor], device="meta")
        place = unit.places[tensor]
        return torch.empty(place.shape, dtype=DTYPE_OF_CODE[place.dtype], device="meta")

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of a unit."""
        return {tensor: self.tensor(name, tensor) for tensor in self._units[name].names}

    def flush(self) -> None:
        """Write the units that wait."""
        with self._lock:
            waiting = {name: unit for name, unit in self._units.items() if unit.path is None}
            if self._place is None or not waiting:
                return
            with self._place() as folder:
                path = _written(folder, waiting, self._key)
            self._known.add(path)
            for unit, places in zip(waiting.values(), _places(path, waiting.values()), strict=True):
                unit.path, unit.places, unit.waiting = path, places, {}
            self._size, self._written = 0, time.monotonic()

    def look(self) -> None:
        """Take in what runs before this one, or other processes, have written; all other files are removed."""
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.iterdir()):
            if path.suffix != SUFFIX or path in self._known:
                continue
            listed = _listed(path, self._key)
            if listed is None:
                path.unlink(missing_ok=True)
                continue
            self._known.add(path)
            units = [_Unit(facts, tuple(names), {}, path) for _, names, facts in listed]
            for (name, _, _), unit, places in zip(listed, units, _places(path, units), strict=True):
                unit.places = places
                self._units.setdefault(name, unit)


class PartTensors(Mapping[str, torch.Tensor]):
    """The tensors of several units under their own names, read whenever they are looked up: one is held at a time.

    Args:
        parts: where the units are.
        units: their names.
        others: further tensors, in memory.
    """

    def __init__(self, parts: Parts, units: Iterable[str], others: Mapping[str, torch.Tensor] | None = None) -> None:
        self.parts, self.units = parts, list(units)
        self._owners = {tensor: unit for unit in self.units for tensor in parts.names(unit)}
        self._others = dict(others or {})

    def beside(self, others: Mapping[str, torch.Tensor]) -> PartTensors:
        """The same with further tensors."""
        return PartTensors(self.parts, self.units, others)

    def shapes(self) -> dict[str, torch.Tensor]:
        """All of them on the meta device, without a look at the files."""
        others = {name: torch.empty_like(tensor, device="meta") for name, tensor in self._others.items()}
        return {tensor: self.parts.shape(unit, tensor) for tensor, unit in self._owners.items()} | others

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._others[name] if name in self._others else self.parts.tensor(self._owners[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._owners, **self._others})

    def __len__(self) -> int:
        return len({**self._owners, **self._others})


def _written(folder: Path, units: Mapping[str, _Unit], key: str) -> Path:
    """Write units into one file, whose name is the checksum of its bytes."""
    tensors = {f"{number}/{name}": t for number, unit in enumerate(units.values()) for name, t in unit.waiting.items()}
    listed = [[name, unit.names, unit.facts] for name, unit in units.items()]
    partial = folder / f"{os.getpid()}-{threading.get_ident()}.writing"
    try:
        save_file(tensors, partial, metadata={"key": key, "units": json.dumps(listed)})
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise OSError(str(error)) from None
    path = folder / f"{_checksum(partial)}{SUFFIX}"
    partial.replace(path)
    return path


def _places(path: Path, units: Iterable[_Unit]) -> list[dict[str, Tensor]]:
    """Where the tensors of a file's units are in it: its header is read once for all of them."""
    header = read_header(path).tensors
    return [{name: header[f"{number}/{name}"] for name in unit.names} for number, unit in enumerate(units)]


def _mapped(path: Path, place: Tensor) -> torch.Tensor:
    dtype = DTYPE_OF_CODE[place.dtype]
    if not place.size:
        return torch.empty(place.shape, dtype=dtype)
    assert place.start is not None
    data = np.memmap(path, np.uint8, "c", place.start, (place.size,))
    return torch.from_numpy(data).view(dtype).reshape(place.shape)


def _listed(path: Path, key: str) -> list[tuple[str, list[str], dict[str, Any]]] | None:
    """The units of a file: name, names of tensors, facts; None for one that is torn, or another run's."""
    with contextlib.suppress(*UNREADABLE, KeyError, ValueError):
        if _checksum(path) == path.stem:
            with safe_open(path, framework="pt") as file:
                told = file.metadata()
            if told["key"] == key:
                return [(name, names, facts) for name, names, facts in json.loads(told["units"])]
    return None


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def run_key(command: str, options: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """What tells the parts of one run from those of another: everything that decides its result, to the last bit.

    That is the version of surgery and of what computes, the number of threads, the processor's instructions and the
    GPUs, the options, and the inputs.

    Args:
        command: which run it is.
        options: all of them; what JSON does not know counts by its text.
        inputs: identities of what is read, as from `file_identities`.
    """
    told = {
        "format": FORMAT,
        "surgery": __version__,
        "libraries": _library_versions(),
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "command": command,
        "options": dict(options),
        "inputs": dict(inputs),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True, default=str).encode())


@functools.cache
def _library_versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def file_identities(*places: Path | None) -> list[list[Any]]:
    """What recognises files without reading them; of a folder its own files, hidden ones and folders left out."""
    paths: list[Path] = []
    for place in places:
        if place is not None:
            paths += sorted(place.iterdir()) if place.is_dir() else [place]
    return [[path.name, *file_identity(path)] for path in paths if not path.name.startswith(".") and path.is_file()]
