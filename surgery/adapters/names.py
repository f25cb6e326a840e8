"""File names of an adapter folder, and the names of the tensors in its file."""

from __future__ import annotations

from surgery.adapters.foreign_formats import foreign_format
from surgery.adapters.types.base import AdapterType

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "MODEL_PREFIX",
    "PICKLE_FILE",
    "PROVENANCE_FILE",
    "TUNER_PREFIX",
    "WEIGHTS_FILE",
    "TensorNames",
    "split_name",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PROVENANCE_FILE = "surgery.json"
CARD_FILE = "README.md"
MODEL_PREFIX = "base_model.model."
TUNER_PREFIX = "base_model."


class TensorNames:
    """The names of a file's tensors, sorted once.

    Attributes:
        by_module: module -> short name -> name in the file.
        holders: short name -> the modules that have it, in the file's order.
        owners: name in the file -> module, of the tensors that the adapter's type has in its layers.
        foreign: the other tool whose names they are, or None.

    Args:
        listed: the names, as the file has them.
        kind: the adapter's type, which knows the names of a layer's tensors; None for an unknown one.
    """

    def __init__(self, listed: list[str], kind: AdapterType | None) -> None:
        self.listed = listed
        self.by_module: dict[str, dict[str, str]] = {}
        self.holders: dict[str, list[str]] = {}
        self.owners: dict[str, str] = {}
        for name in listed:
            module, short, is_own = split_name(name, kind)
            if is_own:
                self.owners[name] = module
            self.by_module.setdefault(module, {})[short] = name
            self.holders.setdefault(short, []).append(module)
        self.foreign = foreign_format(listed)


def split_name(name: str, kind: AdapterType | None) -> tuple[str, str, bool]:
    """Split the name of a tensor in a PEFT file into its module and the tensor's name there.

    The module is empty for tensors above the model. The third is whether it belongs to a layer of the adapter's type.
    """
    stem = name.removeprefix(MODEL_PREFIX if name.startswith(MODEL_PREFIX) else TUNER_PREFIX)
    own = kind.short_name(stem) if kind is not None else None
    if own is not None:
        return *own, name.startswith(MODEL_PREFIX)
    module, _, short = stem.rpartition(".")
    return module, short, False
