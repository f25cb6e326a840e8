"""`adapter_model.bin`, which PEFT wrote until 2023: a pickle, opened by torch's reader that runs no code."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from surgery.adapters.format_registry import AdapterParts, Format
from surgery.adapters.names import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from surgery.errors import AdapterError
from surgery.formats.peft import peft_parts

__all__ = ["PICKLE"]


class PickleFormat(Format):
    """PEFT's layout with the tensors in a pickle; what is written from it is safetensors."""

    title = "PEFT before 0.5 (adapter_model.bin)"

    def recognises(self, folder: Path) -> bool:
        files = folder / CONFIG_FILE, folder / PICKLE_FILE
        return all(path.is_file() for path in files) and not (folder / WEIGHTS_FILE).is_file()

    def read(self, folder: Path) -> AdapterParts:
        parts = peft_parts(folder, lambda: _unpickled(folder / PICKLE_FILE))
        parts.weights = folder / PICKLE_FILE
        parts.notes.append(f"{PICKLE_FILE} was read without running code from it; what is written is safetensors")
        return parts


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """Read a dictionary of tensors, refusing whatever else the pickle holds.

    Raises:
        AdapterError: it holds something else, or is broken.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise errors of many kinds on broken files
        # What is a pickle, and more than torch's reader of tensors takes, asks for functions to be called.
        with path.open("rb") as file:
            is_pickle = file.read(2).startswith((b"\x80", b"PK"))
        if isinstance(error, pickle.UnpicklingError) and is_pickle:
            raise AdapterError(
                f"{path}: holds more than tensors: it is a pickle, which can run code when opened; ask its author for "
                "safetensors"
            ) from None
        raise AdapterError(f"{path}: cannot be read as a pickle of tensors; save the adapter again") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise AdapterError(f"{path}: holds a {type(found).__name__}, not tensors by name")
    other = next((name for name, value in found.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise AdapterError(f"{path}: {other} is a {type(found[other]).__name__}, not a tensor")
    # Copied: tensors of one storage, or with gaps, have no place in safetensors.
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


PICKLE = PickleFormat()
