"""An adapter on its base model, ready for a trainer: the right class, its head, and what its type trains set free."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import contents_of
from surgery.adapters.fitting import fit_to_model, own_task, with_place_for
from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.packing import is_packed
from surgery.errors import AdapterError, CheckpointError, listing
from surgery.merging.plan import class_names
from surgery.models.base_model import BaseModel
from surgery.models.heads import HEAD_NAMES, HEAD_TASKS, missing_modules
from surgery.models.labels import with_labels
from surgery.models.tasks import TaskName
from surgery.passes.loaded_model import RunSettings, load_model
from surgery.peft_types.loading import attached, load
from surgery.system.devices import Device, resolve_device
from surgery.system.dtypes import LoadedDtype, dtype_name, dtype_named

__all__ = ["Prepared", "base_for", "prepare", "trainable", "trained_parameters"]

ACTIVE = "default"
TRAINED_IN = ("float32", "bfloat16")


@dataclass
class Prepared:
    """What is trained.

    Attributes:
        adapter: the adapter under the names of the model's modules.
        base: the base model's files, under the class that is trained.
        model: the adapter on the loaded base; of its parameters those that train require a gradient.
        names: of what trains, by name in the adapter's file -> by name in the model.
        notes: what the user should know of the adapter's file.
    """

    adapter: Adapter
    base: BaseModel
    model: PeftModel
    names: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, adapter: Adapter, base: BaseModel, model: PeftModel, notes: Sequence[str] = ()) -> Prepared:
        """Return what requires a gradient in the model as what trains.

        Raises:
            AdapterError: a parameter would train that PEFT saves under no name.
        """
        return cls(adapter, base, model, _names_in_file(adapter, model), list(notes))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by name in the adapter's file."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[inner] for name, inner in self.names.items()}


def trainable(
    adapter: str | Path | Adapter,
    base: str | Path | nn.Module | None = None,
    *,
    task: TaskName | None = None,
    only: Sequence[str] = (),
    dtype: LoadedDtype = "float32",
    device: Device = "cpu",
    trust_remote_code: bool = False,
) -> PeftModel:
    """Open an adapter on its base model for a trainer of one's own (TRL, Lightning, a plain loop).

    The class is the one that the adapter was made for, with as many labels as its head has. What the adapter's type
    trains requires a gradient, and the head and biases that it carries to train; nothing else does. The trained model
    is saved with `save_pretrained`, as any PEFT model.

    Args:
        adapter: a folder, a Hub id, or an opened `Adapter`, of any type.
        base: a folder, a Hub id, or a loaded model; default the base that the adapter names.
        task: chooses the model class where `base` is not a model; default the task that the adapter was made for.
        only: train these parts alone, by the last part of their names (`giva_s`, `lora_A`, `classifier`).
        dtype: of the base in memory, float32 or bfloat16; the adapter is float32.
        device: where the base is loaded: cpu, cuda, auto.
        trust_remote_code: run model code that comes with the base.

    Raises:
        AdapterError: the adapter does not fit the model, or nothing of it is called as `only` says.
        CheckpointError: the base cannot be used.
    """
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter)
    if isinstance(base, nn.Module):
        model = load(opened, base, is_trainable=True)
        _keep_only(model, only)
        return model
    name = base if base is not None else opened.config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{opened.label}: names no base model: give it with base")
    return prepare(
        opened, name, task=task, only=only, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    ).model


def prepare(
    adapter: Adapter,
    base: str | Path,
    *,
    task: TaskName | None = None,
    only: Sequence[str] = (),
    dtype: LoadedDtype = "float32",
    device: Device = "cpu",
    trust_remote_code: bool = False,
) -> Prepared:
    """As `trainable`, with the base's files and the adapter as it is named in the model.

    Raises:
        AdapterError: it does not fit, or the task's head is neither in the base nor in the adapter.
        CheckpointError: the base, its class for this task, or the dtype is not to be had.
    """
    if dtype_name(dtype) not in TRAINED_IN:
        raise CheckpointError(f"a base model is trained on in {' or '.join(TRAINED_IN)}, not in {dtype}")
    opened, heads = base_for(adapter, base, task, trust_remote_code)
    _refuse_untrained_head(adapter, opened)
    where = resolve_device(device) if device == "auto" else torch.device(device)
    model = load_model(opened, RunSettings(dtype=dtype_named(dtype, TRAINED_IN), device=where), heads)
    adapter = adapter.opened_on(model)
    fitted = fit_to_model(adapter, model)
    peft_model, notes = attached(fitted, model, is_trainable=True)
    _keep_only(peft_model, only)
    return Prepared.of(fitted, opened, peft_model, notes)


def base_for(
    adapter: Adapter, base: str | Path, task: TaskName | None, trust_remote_code: bool = False
) -> tuple[BaseModel, dict[str, torch.Tensor]]:
    """The base model under the class that an adapter is for.

    Returns:
        The base, and the heads by parameter where they are of another number of labels than the base's: what replaces
        them while the base is loaded.
    """
    opened = BaseModel.open(base, task or own_task(adapter), trust_remote_code)
    if adapter.type is not None and adapter.type.opened_as is not None:  # read on the loaded model
        return opened, {}
    contents = contents_of(adapter)
    if task is None:
        opened = with_place_for(opened, adapter, contents, trust_remote_code)
    heads = {name: adapter.tensors[key] for name, key in contents.carried.items() if name in opened.shapes}
    config = with_labels(opened, heads, class_names(adapter))
    if config is None:
        return opened, {}
    return opened.with_config(type(opened.config).from_dict(copy.deepcopy(config))), heads


def trained_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """What requires a gradient, by its name in an adapter's file."""
    return {_file_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def _names_in_file(adapter: Adapter, model: PeftModel) -> dict[str, str]:
    """Return what trains, by the name under which PEFT saves it -> by name in the model.

    PEFT saves some parameters under names that do not follow from theirs: DoRA's magnitudes, what layers share.

    Raises:
        AdapterError: it saves one under no name.
    """
    listed = adapter.file_tensors()
    names, others = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and _file_name(name) in listed:
            names[_file_name(name)] = name
        elif parameter.requires_grad:
            others[parameter.data_ptr()] = name
    if others:
        for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
            if tensor.data_ptr() in others:
                names[key] = others.pop(tensor.data_ptr())
    if others and not is_packed(adapter.config):
        raise AdapterError(
            f"{adapter.label}: {listing(others.values(), 3)} would train, and PEFT does not save it with a "
            f"{adapter.peft_type} adapter of this kind; train it with PEFT itself, or convert it first"
        )
    return {**names, **{_file_name(name): name for name in others.values()}}


def _file_name(name: str) -> str:
    """PEFT's name of a parameter without the adapter's name and the wrapper of a module that is saved whole."""
    parts = name.split(".")
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]
        return ".".join(parts)
    return ".".join(part for part in parts if part != ACTIVE)


def _refuse_untrained_head(adapter: Adapter, base: BaseModel) -> None:
    """Refuse a task whose head is drawn anew at every load: what was trained below it would be lost."""
    if base.task is None or base.task.name not in HEAD_TASKS:
        return
    missing = [name for name in missing_modules(base) if name.partition(".")[0].endswith(HEAD_NAMES)]
    lost = [name for name in missing if not any(key.startswith(f"{MODEL_PREFIX}{name}.") for key in adapter.tensors)]
    if lost:
        raise AdapterError(
            f"{adapter.label}: neither it nor the base model has the head {listing(lost, 2)} of {base.task.name}; make "
            f"an adapter with one: surgery init --task {base.task.name}"
        )


def _keep_only(model: PeftModel, only: Sequence[str]) -> None:
    """Freeze what is not called for.

    Raises:
        AdapterError: nothing trains, or something that was called for does not.
    """
    parameters = trained_parameters(model)
    if not parameters:
        raise AdapterError("nothing of this adapter trains")
    if not only:
        return
    unknown = [part for part in only if not any(_is_part(name, part) for name in parameters)]
    if unknown:
        known = sorted(
            {name.rpartition(".")[2] if ".lora_" not in name else name.split(".")[-2] for name in parameters}
        )
        raise AdapterError(f"nothing that trains is called {listing(unknown)}; there are {listing(known)}")
    for name, parameter in parameters.items():
        if not any(_is_part(name, part) for part in only):
            parameter.requires_grad_(False)


def _is_part(name: str, part: str) -> bool:
    return part in name.removeprefix(MODEL_PREFIX).split(".")
