"""File names of an adapter folder, and the names of the tensors in its file."""

from __future__ import annotations

from surgery.adapters.foreign_formats import foreign_format

__all__ = ["CONFIG_FILE", "PROVENANCE_FILE", "WEIGHTS_FILE"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PROVENANCE_FILE = "surgery.json"
CARD_FILE = "README.md"
MODEL_PREFIX = "base_model.model."
TUNER_PREFIX = "base_model."


class TensorNames:
    """The names of a file's tensors: by module and short name, and the modules by the short names that they have."""

    def __init__(self, listed: list[str]) -> None:
        self.listed = listed
        self.by_module: dict[str, dict[str, str]] = {}
        self.holders: dict[str, list[str]] = {}
        for name in listed:
            stem = name.removeprefix(MODEL_PREFIX if name.startswith(MODEL_PREFIX) else TUNER_PREFIX)
            module, short = _split_name(stem)
            self.by_module.setdefault(module, {})[short] = name
            self.holders.setdefault(short, []).append(module)
        self.foreign = foreign_format(listed)


def _split_name(stem: str) -> tuple[str, str]:
    """A tensor's module and its name there."""
    module, _, short = stem.rpartition(".")
    outer, _, last = module.rpartition(".")
    return (outer, f"{last}.{short}") if last.startswith("lora_") else (module, short)
