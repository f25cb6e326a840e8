"""A file format in one file: a folder with `adapter.npz`, which holds `B` and `A` of each layer by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from surgery.adapters.format_registry import AdapterParts, Format
from surgery.adapters.names import MODEL_PREFIX

FILE = "adapter.npz"


class NumpyFolder(Format):
    """LoRA factors without a configuration: the scale is 1."""

    title = "the numpy example"

    def recognises(self, folder: Path) -> bool:
        return (folder / FILE).is_file()

    def read(self, folder: Path) -> AdapterParts:
        tensors, modules = {}, set()
        with np.load(folder / FILE, allow_pickle=False) as arrays:
            for name in arrays.files:
                module, _, side = name.rpartition(".")
                modules.add(module)
                tensors[f"{MODEL_PREFIX}{module}.lora_{side}.weight"] = torch.from_numpy(arrays[name])
        rank = next(int(tensor.shape[0]) for name, tensor in tensors.items() if "lora_A" in name)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
        return AdapterParts(config, tensors, folder / FILE)

    def write(self, parts: AdapterParts, folder: Path, label: str) -> int:
        names = {
            name: name.removeprefix(MODEL_PREFIX).replace(".lora_", ".").removesuffix(".weight")
            for name in parts.tensors
        }
        np.savez(folder / FILE, **{names[name]: tensor.numpy() for name, tensor in parts.tensors.items()})
        return (folder / FILE).stat().st_size

    def changes(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        with np.load(folder / FILE, allow_pickle=False) as arrays:
            for module in sorted({name.rpartition(".")[0] for name in arrays.files}):
                yield module, torch.from_numpy(arrays[f"{module}.B"] @ arrays[f"{module}.A"])


def _short(name: str) -> str:
    return name.removeprefix(MODEL_PREFIX).replace(".lora_", ".").removesuffix(".weight")


NUMPY = NumpyFolder()
