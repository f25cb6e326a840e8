"""Any adapter on a model for the time of a block, without PEFT: one copy of the base serves several in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from surgery.errors import AdapterError
from surgery.linalg.delta import Delta

__all__ = ["applied"]


@contextlib.contextmanager
def applied(
    model: nn.Module, deltas: Mapping[str, Delta], carried: Mapping[str, torch.Tensor] | None = None
) -> Iterator[nn.Module]:
    """The model with weight changes and replaced parameters; on leaving it is as it was, to the last bit.

    Args:
        model: the base model.
        deltas: by the name of a linear in the model, the change that is added to its output.
        carried: by the name of a parameter in the model, the values that take its place (heads, biases).

    Raises:
        AdapterError: the model has no such module or parameter, or of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in (carried or {}).items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            found = tuple(parameters[name].shape) if name in parameters else "none"
            raise AdapterError(f"{name}: the adapter saves it as {tuple(tensor.shape)}, the model has {found}")
    handles, before = [], {name: parameters[name].data for name in carried or {}}
    try:
        for name, delta in deltas.items():
            handles.append(_linear(model, name).register_forward_hook(_adding(delta)))
        for name, tensor in (carried or {}).items():
            parameters[name].data = tensor.to(parameters[name])
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for name, data in before.items():
            parameters[name].data = data


def _linear(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise AdapterError(f"{type(model).__name__} has no module {name}") from None


def _adding(delta: Delta) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        # Adapters compute in float32 beside a base in half precision, as PEFT's do.
        return output + delta.apply(args[0].float()).to(output.dtype)

    return hook
