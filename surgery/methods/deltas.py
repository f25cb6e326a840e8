"""The weight change of one layer of an adapter, straight from its file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from surgery.catalogue import method_for_type
from surgery.errors import AdapterError, listing
from surgery.linalg.delta import Delta
from surgery.methods.base import OwnMethod, Role, Tensors
from surgery.methods.lora import lora_delta

if TYPE_CHECKING:
    from surgery.checkpoints.adapter import Adapter

__all__ = ["delta_of"]


def delta_of(adapter: Adapter, module: str, weight: torch.Tensor | None = None) -> Delta:
    """The weight change of one layer, float32, on the CPU.

    Args:
        adapter: an adapter of type LORA, VERA, INILORA, FROD_PORTABLE or SMOA.
        module: the layer's name, as in `adapter.modules`.
        weight: the base weight `(out, in)`; needed for FROD_PORTABLE and SMOA, and for VERA, whose file does not say
            how wide a layer is.

    Raises:
        AdapterError: the adapter has no such layer, is of another type, stores no bases, or needs the weight.
    """
    modules = adapter.modules
    parts = modules.get(module)
    if not module or parts is None:
        raise AdapterError(
            f"the adapter changes no module {module!r}; it has {listing(sorted(filter(None, modules)), 4)}"
        )
    if adapter.peft_type == "LORA":
        return lora_delta(adapter.config, module, parts)
    method = method_for_type(adapter.peft_type)
    if method is None:
        raise AdapterError(f"the weight change of a {adapter.peft_type} adapter is not known here")
    if isinstance(method, OwnMethod):
        return _own_delta(adapter, method, module, weight)
    if "vera_A" not in modules.get("", {}):
        raise AdapterError("the VeRA adapter stores no projections; open it with surgery.load")
    if weight is None:
        raise AdapterError(f"{module}: a VeRA file does not say how wide the layer is; give its base weight")
    tensors = {name: tensor.float() for name, tensor in {**parts, **modules[""]}.items()}
    return method.delta(None, tensors, weight)


def _own_delta(adapter: Adapter, method: OwnMethod, module: str, weight: torch.Tensor | None) -> Delta:
    known = {field.name for field in dataclasses.fields(method.config_class)}
    config: Any = method.config_class(**{key: value for key, value in adapter.config.items() if key in known})
    if method.names(Role.BASE) and not config.store_bases:
        raise AdapterError("the adapter stores no bases; open it with surgery.load, which regenerates them")
    if weight is None and method.needs_base(config):
        raise AdapterError(f"the weight change of {method.info.title} needs the base weight")
    modules = adapter.modules
    tensors = _short_names(method, modules[module])
    for name in method.names(Role.BASE, shared=True):
        if name not in tensors:
            tensors[name] = _short_names(method, modules[_owner(method, modules, module)])[name]
    tensors.update(method.shared_derived(config, tensors))
    whole = weight.float() if weight is not None else None
    if whole is not None:
        tensors.update(method.derived(config, tensors, lambda: whole))
    return method.delta(config, tensors, whole)


def _short_names(method: OwnMethod, parts: Tensors) -> Tensors:
    return {
        name.removeprefix(method.prefix): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in parts.items()
    }


def _owner(method: OwnMethod, modules: dict[str, Tensors], module: str) -> str:
    """The module that stores what `module` shares: its name differs in one number, the block's, and it fits."""
    first = method.names(Role.BASE, shared=True)[0]
    width = modules[module][f"{method.prefix}{method.names(Role.KEPT)[0]}"].shape[0]
    parts = module.split(".")
    for candidate, tensors in modules.items():
        others = candidate.split(".")
        base = tensors.get(f"{method.prefix}{first}")
        if base is None or base.shape[0] != width or len(parts) != len(others):
            continue
        different = [(a, b) for a, b in zip(parts, others, strict=True) if a != b]
        if len(different) == 1 and all(text.isdigit() for text in different[0]):
            return candidate
    raise AdapterError(f"{module}: no module stores the {first} that it shares")
