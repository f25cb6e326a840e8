"""The weight change of one layer of an adapter, straight from its file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from surgery.adapters.contents import check_layer, refuse_unreadable, with_shared
from surgery.adapters.stock_types import STOCK
from surgery.deltas.operators import Delta
from surgery.errors import AdapterError, MethodError, SurgeryError, listing
from surgery.methods.base import OwnMethod, Role, Tensors
from surgery.methods.regeneration import leaves_out_bases
from surgery.methods.registry import method_for_type
from surgery.models.sites import Site
from surgery.system.threads import one_torch_thread

if TYPE_CHECKING:
    from surgery.adapters.adapter import Adapter

__all__ = ["delta_of", "own_config", "own_delta", "short_names", "stock_delta"]


def delta_of(adapter: Adapter, module: str, weight: torch.Tensor | None = None) -> Delta:
    """The weight change of one layer, float32, `(out, in)` whatever the orientation of the layer's weight.

    Args:
        adapter: an adapter of type LORA, LOHA, LOKR, HIRA, RANDLORA, VERA, INILORA, FROD_PORTABLE or SMOA.
        module: the layer's name, as in `adapter.modules`.
        weight: the base weight `(out, in)`; needed for HIRA, FROD_PORTABLE and SMOA, and for VERA and RANDLORA, whose
            files do not say how wide a layer is.

    Returns:
        The change on the CPU, where the file's tensors are, or on the device of `weight` for a type that needs it.

    Raises:
        AdapterError: the adapter has no such layer, is of another type or variant, stores no bases, holds tensors that
            are broken, or needs the weight.
    """
    refuse_unreadable(adapter)
    parts = adapter.layer(module)
    if not module or not parts:
        raise AdapterError(
            f"the adapter changes no module {module!r}; it has {listing(sorted(filter(None, adapter.modules)), 4)}"
        )
    if adapter.peft_type in STOCK:
        return stock_delta(adapter, module, parts, weight)
    check_layer(adapter, module, parts)
    method = method_for_type(adapter.peft_type)
    assert method is not None
    if isinstance(method, OwnMethod):
        return _own_delta(adapter, method, module, weight)
    above = adapter.layer("")
    if "vera_A" not in above:
        raise AdapterError("the VeRA adapter stores no projections; open it with surgery.load")
    if weight is None:
        raise AdapterError(f"{module}: a VeRA file does not say how wide the layer is; give its base weight")
    return method.delta(None, in_float32({**parts, **above}, weight.device), weight)


def stock_delta(adapter: Adapter, module: str, parts: Tensors, weight: torch.Tensor | None) -> Delta:
    """The weight change of one layer of a stock type, from its tensors.

    Raises:
        AdapterError: as `delta_of`.
    """
    parts = with_shared(adapter, parts)
    whole = weight.float() if weight is not None else None
    with one_torch_thread():  # checks and conversions of thin factors, bound by memory
        check_layer(adapter, module, parts)
        tensors = in_float32(parts, whole.device if whole is not None else "cpu")
    return STOCK[adapter.peft_type].formula(adapter.config, module, tensors, whole)


def own_config(adapter: Adapter, method: OwnMethod) -> Any:
    """The configuration of an adapter of ours.

    Raises:
        AdapterError: its file holds values that PEFT or the method does not take.
    """
    known = {field.name for field in dataclasses.fields(method.config_class)}
    try:
        return method.config_class(**{key: value for key, value in adapter.config.items() if key in known})
    except SurgeryError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise AdapterError(f"adapter_config.json: {str(error).strip() or type(error).__name__:.300}") from None


def own_delta(method: OwnMethod, config: Any, tensors: Tensors, weight: torch.Tensor | None, module: str) -> Delta:
    """The weight change of one layer of ours, from all its stored tensors, shared and regenerated ones included.

    Args:
        method: the adapter's method.
        config: its configuration.
        tensors: by short name.
        weight: the base weight `(out, in)`, float32, where the method needs it.
        module: the layer's name.

    Raises:
        AdapterError: tensors are missing, or of other kinds or shapes than the configuration says.
    """
    _check_own(method, config, tensors, weight, module)
    if not set(method.names(Role.DERIVED, shared=True)) <= set(tensors):
        tensors = {**tensors, **method.shared_derived(config, tensors)}
    if weight is not None:
        whole = weight
        tensors = {**tensors, **method.derived(config, tensors, lambda: whole)}
    return method.delta(config, tensors, weight, module)


def _check_own(method: OwnMethod, config: Any, tensors: Tensors, weight: torch.Tensor | None, module: str) -> None:
    wanted = method.names(Role.TRAINABLE, Role.KEPT, Role.BASE)
    missing = [f"{method.prefix}{name}" for name in wanted if name not in tensors]
    if missing:
        raise AdapterError(f"{module}: the file lacks {listing(missing)}")
    site = _site_of(tensors, weight, module)
    try:
        shapes = _packed_shapes(tensors) if getattr(config, "packed", None) else method.shapes(config, site)
        whole = {name for name in wanted if not method.dtype(name, site).is_floating_point}
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MethodError) as error:
        raise AdapterError(f"{module}: adapter_config.json does not fit its tensors ({error})") from None
    for name in wanted:
        found, called = tensors[name], f"{module}.{method.prefix}{name}"
        if tuple(found.shape) != shapes[name]:
            raise AdapterError(f"{called} has shape {tuple(found.shape)}, adapter_config.json says {shapes[name]}")
        if found.is_floating_point() == (name in whole) or found.is_complex():
            raise AdapterError(f"{called} is {found.dtype}, expected {'whole' if name in whole else 'real'} numbers")


def _site_of(tensors: Tensors, weight: torch.Tensor | None, module: str) -> Site:
    """The layer that tensors are for, by the weight or by the tensors that are as high and as wide."""

    def size(names: tuple[str, ...], axis: int) -> int:
        if weight is not None:
            return int(weight.shape[axis])
        found = next((tensors[name] for name in names if name in tensors and tensors[name].ndim > axis), None)
        return int(found.shape[axis]) if found is not None else 0

    return Site(module, module, module, None, size(("o", "B"), 0), size(("A", "V"), 1))


def _packed_shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Of factors that were unpacked, and are a pair: what belongs to them."""
    A, B = tensors["A"], tensors["B"]
    rank = A.shape[0] if A.ndim else 0
    return {"A": tuple(A.shape), "B": (B.shape[0], rank), "s": (rank,), "o": (B.shape[0],)}


def short_names(method: OwnMethod, parts: Tensors, device: torch.device | str = "cpu") -> Tensors:
    """The tensors of a layer of ours by their short names, floating-point ones in float32."""
    return in_float32({name.removeprefix(method.prefix): tensor for name, tensor in parts.items()}, device)


def in_float32(tensors: Tensors, device: torch.device | str) -> Tensors:
    """Tensors on a device, floating-point ones in float32."""
    return {name: (t.float() if t.is_floating_point() else t).to(device) for name, t in tensors.items()}


def _own_delta(adapter: Adapter, method: OwnMethod, module: str, weight: torch.Tensor | None) -> Delta:
    config = own_config(adapter, method)
    if leaves_out_bases(method, config):
        raise AdapterError("the adapter stores no bases; open it with surgery.load, which regenerates them")
    if weight is None and method.needs_base(config):
        raise AdapterError(f"the weight change of {method.info.title} needs the base weight")
    whole = weight.float() if weight is not None else None
    device = whole.device if whole is not None else torch.device("cpu")
    tensors = short_names(method, adapter.layer(module), device)
    for name in method.names(Role.BASE, shared=True):
        if name not in tensors:
            tensors[name] = short_names(method, adapter.layer(_owner(adapter, method, module)), device)[name]
    return own_delta(method, config, tensors, whole, module)


def _owner(adapter: Adapter, method: OwnMethod, module: str) -> str:
    """The module that stores what `module` shares: its name differs in one number, the block's, and it fits."""
    first = method.names(Role.BASE, shared=True)[0]
    stored = f"{method.prefix}{first}"
    width = adapter.layer(module)[f"{method.prefix}{method.names(Role.KEPT)[0]}"].shape[0]
    parts = module.split(".")
    for candidate in adapter.holders(stored):
        others = candidate.split(".")
        if len(parts) != len(others) or adapter.layer(candidate)[stored].shape[0] != width:
            continue
        different = [(a, b) for a, b in zip(parts, others, strict=True) if a != b]
        if len(different) == 1 and all(text.isdigit() for text in different[0]):
            return candidate
    raise AdapterError(f"{module}: no module stores the {first} that it shares")
