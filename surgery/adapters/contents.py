"""What an adapter's file holds: which layers it changes, and which tensors it replaces whole.

The reading is strict: what cannot be read exactly is refused by name, here and before any work.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgery.adapters.lora import BIAS_NAME, refuse_variants
from surgery.adapters.names import MODEL_PREFIX, TUNER_PREFIX
from surgery.adapters.stock_types import REFUSED, STOCK, StockType
from surgery.errors import AdapterError, listing
from surgery.methods.base import OwnMethod, Role
from surgery.methods.catalogue import METHODS, OWN_TYPES
from surgery.methods.registry import method_for_type
from surgery.system.threads import one_torch_thread

if TYPE_CHECKING:
    from surgery.adapters.adapter import Adapter

__all__ = [
    "Contents",
    "check_layer",
    "contents_of",
    "readable_types",
    "refuse_output_biases",
    "refuse_unreadable",
    "with_shared",
]

Tensors = Mapping[str, torch.Tensor]
VERA_NAMES = frozenset({"vera_lambda_b", "vera_lambda_d"})
VERA_SHARED = frozenset({"vera_A", "vera_B"})
TOKENS = "token_adapter."
STORED = (Role.TRAINABLE, Role.KEPT, Role.BASE)
# So many numbers are checked at a time.
NUMBERS = 1 << 20


@dataclass(frozen=True)
class Contents:
    """The tensors of an adapter's file, sorted by what they do. All names are the file's own.

    Attributes:
        modules: the layers whose weights it changes, in the file's order, as `Adapter.delta` takes them.
        carried: what is saved whole and replaces the base's (heads of `modules_to_save`, biases, embeddings): name of
            the parameter in the model -> name of the tensor in the file. It is carried from form to form bit for bit.
        shared: tensors above the model, for all layers (VeRA's projections).
        spare: tensors that nobody reads: PEFT stores a module that it saves whole, whose vocabulary has grown, a second
            time under the name of its wrapper, and its frozen original with it.
    """

    modules: list[str]
    carried: dict[str, str]
    shared: list[str]
    spare: list[str]


def readable_types() -> list[str]:
    """The PEFT types whose weight changes are read."""
    return sorted({*STOCK, *(info.peft_type for info in METHODS.values())})


def contents_of(adapter: Adapter) -> Contents:
    """Sort an adapter's tensors, and check that every one of them is understood.

    Raises:
        AdapterError: the adapter is of a type or variant that cannot be read exactly, a layer lacks tensors or has
            others, a tensor is not floating point, of wrong dimensions or not finite, or the names are those of
            another tool's format.
    """
    refuse_unreadable(adapter)
    names = _layer_names(adapter.peft_type)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    carried: dict[str, str] = {}
    shared: list[str] = []
    spare: list[str] = []
    for name, tensor in adapter.tensors.items():
        if not name.startswith(MODEL_PREFIX):
            shared.append(name)
            continue
        if _is_spare(name, adapter.tensors):
            spare.append(name)
            continue
        module, short = _split(name.removeprefix(MODEL_PREFIX), names)
        if short is None:
            carried[_carried_parameter(adapter, module, tensor)] = name
        else:
            modules.setdefault(module, {})[short] = tensor
    with one_torch_thread():  # small tensors: waking another thread takes longer, by far where the cores are busy
        for module, tensors in modules.items():
            _check_change(adapter, module, with_shared(adapter, tensors))
    if not modules:
        raise AdapterError(f"{who(adapter)}: changes no layer: it has {listing(adapter.tensors, 3) or 'no tensors'}")
    _check_shared(adapter, shared)
    return Contents(list(modules), carried, shared, spare)


def _check_change(adapter: Adapter, module: str, tensors: Tensors) -> None:
    check_layer(adapter, module, tensors)
    stock = STOCK.get(adapter.peft_type)
    if stock is not None and stock.reads_weight == "nothing":
        stock.formula(adapter.config, module, tensors, None)  # the shapes fit, the scale is known


def who(adapter: Adapter) -> str:
    """What an error calls an adapter."""
    return str(adapter.folder) if adapter.folder is not None else "the adapter"


def refuse_unreadable(adapter: Adapter) -> None:
    """Refuse an adapter by its configuration and the form of its names.

    Raises:
        AdapterError: its type or variant cannot be read exactly, or its names are another tool's.
    """
    kind, name = adapter.peft_type, who(adapter)
    if kind in REFUSED:
        raise AdapterError(f"{name}: {REFUSED[kind]}")
    if kind not in readable_types():
        raise AdapterError(
            f"{name}: the weight change of a {kind} adapter is not known here, only those of "
            f"{', '.join(readable_types())}"
        )
    if kind == "LORA":
        refuse_variants(adapter.config, name)
    if adapter.foreign is not None:
        raise AdapterError(f"{name}: {adapter.foreign}")


def refuse_output_biases(adapter: Adapter) -> None:
    """Refuse a LoRA whose B has biases (`lora_bias`), where only weight changes are kept; biases of zero are none.

    Raises:
        AdapterError: it has.
    """
    lost = [module for module in adapter.holders(BIAS_NAME) if bool(adapter.layer(module)[BIAS_NAME].any())]
    if lost:
        raise AdapterError(
            f"{who(adapter)}: the lora_B of {listing(lost, 2)} has a bias (lora_bias), which no other form has a place "
            "for; add it to the base with surgery merge"
        )


def with_shared(adapter: Adapter, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of one layer of a stock type, with those that the file holds once for all layers."""
    stock = STOCK.get(adapter.peft_type)
    shared = stock.shared if stock is not None else frozenset()
    above = {
        name: adapter.tensors[f"{TUNER_PREFIX}{name}"] for name in shared if f"{TUNER_PREFIX}{name}" in adapter.tensors
    }
    return {**above, **tensors}


def check_layer(adapter: Adapter, module: str, tensors: Tensors) -> None:
    """Check the tensors of one layer: all there, floating point, of the right dimensions, finite.

    Raises:
        AdapterError: they are not.
    """
    stock = STOCK.get(adapter.peft_type)
    if stock is not None:
        _check_stock(stock, module, tensors)
    elif adapter.peft_type == "VERA" and set(tensors) != VERA_NAMES:
        raise AdapterError(f"{module}: expected {listing(sorted(VERA_NAMES))}, found {listing(sorted(tensors))}")
    elif adapter.peft_type in OWN_TYPES:
        _check_complete(adapter, module, tensors)
    for name, tensor in tensors.items():
        _check_finite(f"{module}.{name}", tensor)


def _check_complete(adapter: Adapter, module: str, tensors: Tensors) -> None:
    """Check that a layer of ours has what each layer has for itself; what a role shares is in one of them."""
    method = method_for_type(adapter.peft_type)
    assert isinstance(method, OwnMethod)
    roles = (Role.TRAINABLE, Role.KEPT) if adapter.config.get("store_bases") is False else STORED
    wanted = [f"{method.prefix}{name}" for name in method.names(*roles, shared=False)]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise AdapterError(f"{module}: the file lacks {listing(missing)}; save the adapter again")


def _check_stock(stock: StockType, module: str, tensors: Tensors) -> None:
    for name in tensors:
        if name in stock.refused:
            raise AdapterError(
                f"{module}: is {stock.refused[name]} ({name}), which is not read here; merge it with PEFT "
                "(merge_and_unload)"
            )
    if frozenset(tensors) not in stock.layouts:
        wanted = min(stock.layouts, key=lambda layout: (len(layout ^ set(tensors)), len(layout)))
        raise AdapterError(
            f"{module}: expected {listing(sorted(wanted))}, found {listing(sorted(tensors))}; {stock.incomplete}"
        )
    for name, tensor in tensors.items():
        expected = stock.dimensions.get(name, 2)
        if tensor.ndim != expected or 0 in tensor.shape:
            kind = "is a convolution" if tensor.ndim > expected else "is no matrix"
            raise AdapterError(
                f"{module}: {kind} ({name} has shape {tuple(tensor.shape)}), only linear layers are read; save the "
                "adapter without it, or merge it with PEFT (merge_and_unload)"
            )


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_complex():
        raise AdapterError(f"{name} is {tensor.dtype}: no adapter has complex numbers")
    if not tensor.is_floating_point():
        if name.rpartition(".")[2].startswith(tuple(f"{kind.lower()}_" for kind in OWN_TYPES)):
            return  # positions, cuts, checks of our own types
        raise AdapterError(
            f"{name} is {tensor.dtype}, not floating point: a quantised adapter is not read; give it in float32 or "
            "half precision"
        )
    if not _is_finite(tensor):
        raise AdapterError(f"{name} holds NaN or Inf: the training diverged, or the file is broken")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite; some at a time, so that a large head is not copied whole."""
    parts = tensor.detach().reshape(-1).split(NUMBERS) if tensor.numel() else ()
    with one_torch_thread():
        # Extremes show NaN as well as Inf, and need no mask.
        return all(math.isfinite(float(end)) for part in parts for end in torch.aminmax(part.float()))


def _check_shared(adapter: Adapter, names: Iterable[str]) -> None:
    known = STOCK[adapter.peft_type].shared if adapter.peft_type in STOCK else VERA_SHARED
    for name in names:
        if name.removeprefix(TUNER_PREFIX) not in known or adapter.peft_type in OWN_TYPES:
            raise AdapterError(f"{who(adapter)}: has the tensor {name}, which PEFT's {adapter.peft_type} does not have")
        _check_finite(name, adapter.tensors[name])


def _layer_names(peft_type: str) -> frozenset[str] | str:
    """The names that a layer's tensors can have, or what they start with."""
    if peft_type in STOCK:
        return STOCK[peft_type].names
    if peft_type == "VERA":
        return VERA_NAMES
    method = method_for_type(peft_type)
    assert isinstance(method, OwnMethod)
    return method.prefix


def _split(stem: str, names: frozenset[str] | str) -> tuple[str, str | None]:
    """A layer and the short name of its tensor; or the whole name and None for a tensor that is carried."""
    module, _, last = stem.rpartition(".")
    if isinstance(names, str):
        return (module, last) if last.startswith(names) else (stem, None)
    if last in names:
        return module, last
    outer, _, inner = module.rpartition(".")
    if f"{inner}.{last}" in names:
        return outer, f"{inner}.{last}"
    return stem, None


def _is_spare(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is a wrapper's copy, or the frozen original, of one that is saved whole under its plain name."""
    return any(part in name and name.replace(part, ".") in names for part in (".modules_to_save.", ".original_module."))


def _carried_parameter(adapter: Adapter, stem: str, tensor: torch.Tensor) -> str:
    """The model's parameter that a tensor replaces.

    Raises:
        AdapterError: it belongs to a part of an adapter that is not known here.
    """
    if TOKENS in stem:
        raise AdapterError(
            f"{who(adapter)}: trains single tokens ({stem}), which is not read here; merge it with PEFT "
            "(merge_and_unload)"
        )
    prefixes = (f"{adapter.peft_type.lower()}_", "lora_", "hada_")
    odd = next((part for part in stem.split(".") if part.startswith(prefixes)), None)
    if odd is not None:
        raise AdapterError(
            f"{who(adapter)}: has the tensor {stem}, and {odd} is not known as a part of {adapter.peft_type}; merge it "
            "with PEFT (merge_and_unload)"
        )
    if tensor.is_floating_point():
        _check_finite(stem, tensor)
    # The parameter of an adapted layer lies one level deeper while the adapter is on it.
    return stem.replace(".base_layer.", ".")
