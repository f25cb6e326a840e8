"""Any adapter on a model for the time of a block, without PEFT: one copy of the base serves several in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from surgery.deltas.on_layers import added_output
from surgery.deltas.operators import Delta
from surgery.errors import AdapterError
from surgery.models.sites import Site, expert_sites

__all__ = ["applied"]


@contextlib.contextmanager
def applied(
    model: nn.Module, deltas: Mapping[str, Delta], carried: Mapping[str, torch.Tensor] | None = None
) -> Iterator[nn.Module]:
    """The model with weight changes and replaced parameters; on leaving it is as it was, to the last bit.

    A value takes its place under the one name: a weight that is tied to another comes apart for as long as it lasts, as
    it does where PEFT saves a module whole.

    Args:
        model: the base model.
        deltas: by the name of a layer in the model, the change of its weight `(out, in)`, and of its bias.
        carried: by the name of a parameter or buffer in the model, the values that take its place (heads, biases).

    Raises:
        AdapterError: the model has no such module or parameter, or of another shape.
    """
    with contextlib.ExitStack() as stack:
        for name, value in (carried or {}).items():
            _replace(model, name, value, stack)
        experts = {name: delta for name, delta in deltas.items() if _is_expert(model, name)}
        for name, value in _with_experts(model, experts).items():
            _replace(model, name, value, stack)
        for name, delta in deltas.items():
            if name in experts:
                continue
            stack.callback(_linear(model, name).register_forward_hook(_adding(delta), with_kwargs=True).remove)
        yield model


def _replace(model: nn.Module, name: str, value: torch.Tensor, stack: contextlib.ExitStack) -> None:
    """Another value in place of a parameter until the stack is unwound; not in its storage, which tied ones share."""
    path, _, short = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise AdapterError(f"{name}: {type(model).__name__} has no module {path}") from None
    held: Any = module._parameters if short in module._parameters else module._buffers
    old = held.get(short)
    if old is None or old.shape != value.shape:
        found = "none" if old is None else str(tuple(old.shape))
        raise AdapterError(f"{name}: the adapter saves it as {tuple(value.shape)}, the model has {found}")
    new = value.to(old.device, old.dtype)
    stack.callback(held.__setitem__, short, old)
    held[short] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _is_expert(model: nn.Module, name: str) -> bool:
    """Whether a layer is one expert of a parameter of three dimensions."""
    path, _, index = name.rpartition(".")
    owner, _, short = path.rpartition(".")
    try:
        held = model.get_submodule(owner)._parameters.get(short)
    except AttributeError:
        return False
    return index.isdigit() and held is not None and held.ndim == 3


def _with_experts(model: nn.Module, deltas: Mapping[str, Delta]) -> dict[str, torch.Tensor]:
    """Parameters of three dimensions with the changes of their experts."""
    found: dict[str, torch.Tensor] = {}
    sites: dict[str, Site] = {}
    for name, delta in deltas.items():
        parameter = name.rpartition(".")[0]
        if parameter not in found:
            held = model.get_parameter(parameter).detach()
            found[parameter] = held.clone()
            sites.update({site.module: site for site in expert_sites(model, parameter, held)})
        site = sites[name]
        assert site.expert is not None
        whole = found[parameter]
        whole[site.expert] = (whole[site.expert].float() + site.stored(delta.dense()).to(whole.device)).to(whole.dtype)
    return found


def _linear(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise AdapterError(f"{type(model).__name__} has no module {name}") from None


def _adding(delta: Delta) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = args[0] if args else next(iter(named.values()))
        # Adapters compute in float32 beside a base in half precision, as PEFT's do.
        wide = x.float() if x.is_floating_point() else x
        return output + added_output(module, delta, wide, output).to(output.dtype)

    return hook
