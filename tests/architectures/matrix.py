"""What becomes of an adapter on all linear layers of a tiny model, under the names that the model's files have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Conv1D

import surgery
from surgery.errors import SurgeryError
from surgery.models.module_names import ModelNames
from tests.architectures.specimens import save_specimen

__all__ = ["results", "trial"]

RANK = 2
SCALE = 2.0
CLOSE = 1e-5
PREFIX = "base_model.model."
# Models of which PEFT refuses out_proj, whose forward their kernels never call.
MAMBA = {"mamba", "mamba2", "nemotron_h", "bamba", "zamba2", "falcon_mamba"}


def trial(name: str, folder: Path, names: str) -> dict[str, str]:
    """The verbs on one architecture: `equal`, or what is wrong.

    Args:
        name: of the specimen.
        folder: an empty folder.
        names: `files` for the names that the model's files have, which are those of transformers 4; `model` for those
            of today's modules.
    """
    base, adapter = folder / "base", folder / "adapter"
    model = save_specimen(name, base)
    factors = _factors(model, base, names)
    _save_adapter(factors, adapter)
    want = _dense(model, base, factors, folder / "dense", names)
    return {
        "merge": results(lambda: _merged(adapter, base, folder / "merged", type(model)), want),
        "load": results(lambda: _loaded(adapter, model, base), want),
        "convert": results(lambda: _converted(adapter, model, base, folder / "converted"), want),
    }


def results(made: Any, want: dict[str, torch.Tensor]) -> str:
    """Compare the weights that a function gives with those that are wanted."""
    try:
        found = made()
    except SurgeryError as error:
        return f"refused: {error}"
    if found.keys() != want.keys():
        return f"other parameters: {sorted(found.keys() ^ want.keys())[:3]}"
    off = {key: float((found[key].float() - want[key].float()).abs().max()) for key in want if want[key].numel()}
    worst = max(off, key=lambda key: off[key])
    return "equal" if off[worst] < CLOSE else f"{worst} is off by {off[worst]:.1e}"


def _factors(model: nn.Module, base: Path, names: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`(B, A)` by the name of a weight, for each linear layer and each matrix that is a part of one or of experts."""
    known = ModelNames(model)
    shapes = {}
    if names == "model":
        for module, layer in known.modules.items():
            if isinstance(layer, (nn.Linear, Conv1D)) and _is_adaptable(model, module):
                shape = layer.weight.shape
                shapes[f"{module}.weight"] = tuple(shape[::-1] if isinstance(layer, Conv1D) else shape)
    else:
        for key, tensor in load_file(base / "model.safetensors").items():
            module = key.removesuffix(".weight")
            place = known.located(module, known.modules)
            layer = known.modules.get(place or "")
            part = None if layer is not None else known.fused_part(key)
            if tensor.ndim != 2 or module == key:
                continue
            if (isinstance(layer, (nn.Linear, Conv1D)) and _is_adaptable(model, place)) or (
                part is not None and _of_linears(known, part.targets())
            ):
                shape = tensor.shape
                shapes[key] = tuple(shape[::-1] if isinstance(layer, Conv1D) else shape)
    torch.manual_seed(1)
    return {
        key: (torch.randn(height, RANK) * 0.1, torch.randn(RANK, width) * 0.1)
        for key, (height, width) in shapes.items()
    }


def _is_adaptable(model: Any, module: str) -> bool:
    """Whether PEFT adapts a layer by itself: no weight that is tied to embeddings, none whose forward is not called."""
    tied = getattr(model, "all_tied_weights_keys", {})
    parent = model.get_submodule(module.rpartition(".")[0])
    uncalled = model.config.model_type in MAMBA and module.endswith("out_proj")
    uncalled = uncalled or isinstance(parent, nn.MultiheadAttention)
    return not uncalled and f"{module}.weight" not in {*tied, *tied.values()}


def _of_linears(known: ModelNames, targets: list[str]) -> bool:
    linear = all(isinstance(known.modules.get(target.removesuffix(".weight")), nn.Linear) for target in targets)
    return linear or all(known.parameters[target].ndim == 3 for target in targets)


def _save_adapter(factors: dict[str, tuple[torch.Tensor, torch.Tensor]], folder: Path) -> None:
    folder.mkdir()
    tensors = {}
    for key, (B, A) in factors.items():
        module = key.removesuffix(".weight")
        tensors[f"{PREFIX}{module}.lora_B.weight"], tensors[f"{PREFIX}{module}.lora_A.weight"] = B, A
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({key.removesuffix(".weight") for key in factors})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _dense(
    model: Any, base: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], folder: Path, names: str
) -> dict[str, torch.Tensor]:
    """The weights of the model with the changes added by hand: to its files, or to its modules."""
    changes = {key: SCALE * B @ A for key, (B, A) in factors.items()}
    if names == "model":
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for key, change in changes.items():
            whole = state[key]
            whole += change.T if isinstance(model.get_submodule(key.removesuffix(".weight")), Conv1D) else change
        return state
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    for key, change in changes.items():
        tensors[key] = tensors[key] + (change.T if _is_conv1d(model, key) else change)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return dict(type(model).from_pretrained(folder).state_dict())


def _is_conv1d(model: nn.Module, key: str) -> bool:
    known = ModelNames(model)
    place = known.located(key.removesuffix(".weight"), known.modules)
    return place is not None and isinstance(known.modules[place], Conv1D)


def _merged(adapter: Path, base: Path, out: Path, cls: Any) -> dict[str, torch.Tensor]:
    surgery.merge(adapter, base, out)
    return dict(cls.from_pretrained(out).state_dict())


def _loaded(adapter: Path, model: Any, base: Path) -> dict[str, torch.Tensor]:
    live = type(model).from_pretrained(base)
    return dict(surgery.load(adapter, live).merge_and_unload().state_dict())


def _converted(adapter: Path, model: Any, base: Path, out: Path) -> dict[str, torch.Tensor]:
    surgery.convert(adapter, to="lora", base=base, out=out, energy=1.0)
    return _loaded(out, model, base)
