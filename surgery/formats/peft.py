"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, with our provenance beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.companions import companion_files
from surgery.adapters.completeness import check_saved, without_halves
from surgery.adapters.config_schema import check_adapter_config
from surgery.adapters.foreign_formats import foreign_format
from surgery.adapters.format_registry import AdapterParts, Format
from surgery.adapters.names import (
    CARD_FILE,
    CONFIG_FILE,
    MODEL_PREFIX,
    PROVENANCE_FILE,
    TUNER_PREFIX,
    WEIGHTS_FILE,
    TensorNames,
)
from surgery.adapters.packing import is_packed, unpacked
from surgery.adapters.types.registry import type_of
from surgery.adapters.wrapper_names import plain_config, plain_names
from surgery.errors import AdapterError
from surgery.storage.folder_checks import check_link
from surgery.storage.format_version import check_format_version
from surgery.storage.json_files import read_json, read_text
from surgery.storage.safetensors_read import read_tensors, tensor_names
from surgery.system.tensors import TensorMap

__all__ = ["PEFT", "peft_parts", "read_config"]


class PeftFormat(Format):
    """The native format."""

    title = "PEFT"

    def recognises(self, folder: Path) -> bool:
        return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()

    def read(self, folder: Path) -> AdapterParts:
        parts = peft_parts(folder, lambda: _tensors(folder))
        parts.weights, parts.as_stored = folder / WEIGHTS_FILE, not parts.notes
        return parts

    def write(self, parts: AdapterParts, folder: Path, label: str) -> int:
        return Adapter.from_parts(parts).write(folder, label)

    def changes(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        adapter = Adapter.open(folder)
        owners = dict.fromkeys(adapter.names.owners.values())
        return ((module, adapter.delta(module).dense()) for module in owners)


def peft_parts(folder: Path, read: Callable[[], dict[str, torch.Tensor]]) -> AdapterParts:
    """Read a folder in PEFT's layout.

    Args:
        folder: the folder.
        read: reads the tensors, once everything beside them has been checked.

    Raises:
        AdapterError: a file is missing or broken.
    """
    config = read_config(folder)
    check_adapter_config(folder / CONFIG_FILE, config)
    for name in (PROVENANCE_FILE, CARD_FILE):
        check_link(folder / name, folder)  # what they hold is passed on
    provenance = read_json(folder / PROVENANCE_FILE) if (folder / PROVENANCE_FILE).is_file() else {}
    for name, found in ((CONFIG_FILE, config), (PROVENANCE_FILE, provenance)):
        if "format_version" in found:
            check_format_version(found["format_version"], folder / name)
    card = folder / CARD_FILE
    text = read_text(card) if card.is_file() else None
    tensors, notes = plain_names(read(), str(config["peft_type"]), str(folder))
    if notes:
        names = TensorNames(list(tensors), type_of(config))
        config = plain_config(config, sorted(set(names.owners.values())))
    check_saved(config, tensors, str(folder))
    idle, lacking = without_halves(config, TensorNames(list(tensors), type_of(config)).by_module, str(folder))
    tensors, notes = {name: tensors[name] for name in tensors if name not in idle}, notes + lacking
    held: TensorMap = unpacked(config, tensors, TUNER_PREFIX, MODEL_PREFIX) if is_packed(config) else tensors
    return AdapterParts(config, held, provenance=provenance, card=text, notes=notes, companions=companion_files(folder))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise AdapterError(f"{folder}: no {WEIGHTS_FILE}")
    tensor_names(weights)  # a broken file is named here
    return read_tensors(weights)


def read_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Raises:
        AdapterError: it is missing, broken, or leads out of the folder.
    """
    check_link(folder / CONFIG_FILE, folder)
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder}: no {CONFIG_FILE}; {_without_config(folder)}")
    return read_json(folder / CONFIG_FILE)


def _without_config(folder: Path) -> str:
    """Return what a folder without a PEFT configuration is, as far as its files tell."""
    if (folder / "config.json").is_file():
        return "this is a base model, not an adapter"
    for path in sorted(folder.glob("*.safetensors")):
        found = foreign_format(tensor_names(path))
        if found is not None:
            return f"{path.name} is no PEFT adapter: {found}"
    return "this is not an adapter folder"


PEFT = PeftFormat()
