"""What an adapter's file holds: which layers it changes, and which tensors it replaces whole.

The reading is strict: what cannot be read exactly is refused by name, here and before any work.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.names import MODEL_PREFIX, TUNER_PREFIX
from surgery.adapters.tokens import ROWS, is_token_tensor, token_tensors
from surgery.adapters.types.base import MERGE_IN_PEFT, AdapterType, Needs, with_shared
from surgery.adapters.types.tensor_checks import check_finite
from surgery.errors import AdapterError, listing
from surgery.system.threads import one_torch_thread

__all__ = ["Contents", "contents_of", "refuse_output_biases"]


@dataclass(frozen=True)
class Contents:
    """An adapter with its tensors sorted by what they do. All names are the file's own.

    Attributes:
        adapter: the adapter.
        type: its type.
        modules: the layers whose weights it changes, in the file's order, as `Adapter.delta` takes them.
        carried: what is saved whole and replaces the base's (heads of `modules_to_save`, biases, embeddings): name of
            the parameter in the model -> name of the tensor in the file. It is carried from form to form bit for bit.
        shared: tensors above the model, for all layers (VeRA's projections).
        tokens: rows of single tokens that replace the base's: name of the embedding -> name of the tensor in the file.
        spare: tensors that nobody reads: PEFT stores a module that it saves whole, whose vocabulary has grown, a second
            time under the name of its wrapper, and its frozen original with it.
    """

    adapter: Adapter
    type: AdapterType
    modules: list[str]
    carried: dict[str, str]
    shared: list[str]
    spare: list[str]
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        """What its weight changes need of the base model."""
        return self.type.needs(self.adapter.config)

    @property
    def lacks_shared(self) -> bool:
        """Whether the file lacks what its type's layers share, so that it is drawn again from the base's shapes."""
        return self.type.lacks_shared(self.adapter)

    @property
    def carried_tensors(self) -> dict[str, torch.Tensor]:
        """What the adapter saves whole, by its name in the file; rows of single tokens too."""
        return {name: self.adapter.tensors[name] for name in (*self.carried.values(), *self.tokens.values())}

    def output_bias(self, module: str, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return what the adapter adds to the outputs of a layer whatever the input, `(out,)` float32, or None.

        Args:
            module: the layer's name in the adapter.
            bias: the base layer's own bias, which some types scale.
        """
        return self.type.output_bias(self.adapter.config, module, self.adapter.layer(module), bias)


def contents_of(adapter: Adapter) -> Contents:
    """Sort an adapter's tensors, and check that every one of them is understood.

    Raises:
        AdapterError: the adapter is of a type or variant that cannot be read exactly, a layer lacks tensors or has
            others, a tensor is not floating point, of wrong dimensions or not finite, or the names are those of
            another tool's format.
    """
    kind = adapter.readable_type()
    modules: dict[str, None] = {}
    carried: dict[str, str] = {}
    shared: list[str] = []
    spare: list[str] = []
    tokens: dict[str, str] = {}
    owners = adapter.names.owners
    for name in adapter.tensors:
        if not name.startswith(MODEL_PREFIX):
            shared.append(name)
            continue
        if _is_spare(name, adapter.tensors):
            spare.append(name)
            continue
        stem = name.removeprefix(MODEL_PREFIX)
        if is_token_tensor(stem):
            tokens[stem.removesuffix(f".{ROWS}")] = name
        elif name in owners:
            modules[owners[name]] = None
        else:
            carried[_carried_parameter(adapter, stem, adapter.tensors[name])] = name
    token_tensors(adapter)  # they are those that the configuration names
    with one_torch_thread():  # small tensors: waking another thread takes longer, by far where the cores are busy
        for module in modules:
            _check_layer(adapter, kind, module)
    if not modules:
        raise AdapterError(f"{adapter.label}: changes no layer: it has {listing(adapter.tensors, 3) or 'no tensors'}")
    _check_shared(adapter, kind, shared)
    return Contents(adapter, kind, list(modules), carried, shared, spare, tokens)


def refuse_output_biases(contents: Contents, biases: Mapping[str, torch.Tensor | None] | None = None) -> None:
    """Refuse an adapter that adds to outputs (`lora_bias`), where only weight changes are kept; zeros add nothing.

    Args:
        contents: the adapter.
        biases: what it adds by layer, where the base's own biases are known; default what its file alone says.

    Raises:
        AdapterError: it does.
    """
    if biases is None:
        biases = {module: contents.output_bias(module) for module in contents.modules}
    lost = [module for module, bias in biases.items() if bias is not None and bool(bias.any())]
    if lost:
        raise AdapterError(
            f"{contents.adapter.label}: adds a bias to the outputs of {listing(lost, 2)} (lora_bias or IA3), for "
            "which only a LoRA has a place; use --to lora, or add it to the base with surgery merge"
        )


def _check_layer(adapter: Adapter, kind: AdapterType, module: str) -> None:
    tensors = adapter.layer(module)
    kind.check_layer(adapter.config, module, with_shared(kind, adapter, tensors))
    for name, tensor in tensors.items():
        kind.check_numbers(f"{module}.{name}", tensor)


def _check_shared(adapter: Adapter, kind: AdapterType, names: list[str]) -> None:
    for name in names:
        if name.removeprefix(TUNER_PREFIX) not in kind.shared_names:
            raise AdapterError(
                f"{adapter.label}: has the tensor {name}, which PEFT's {adapter.peft_type} does not have"
            )
        kind.check_numbers(name, adapter.tensors[name])


def _is_spare(name: str, names: Collection[str]) -> bool:
    """Return whether a tensor is a wrapper's copy, or the frozen original, of one saved whole under its plain name."""
    return any(part in name and name.replace(part, ".") in names for part in (".modules_to_save.", ".original_module."))


def _carried_parameter(adapter: Adapter, stem: str, tensor: torch.Tensor) -> str:
    """Return the model's parameter that a tensor replaces.

    Raises:
        AdapterError: it belongs to a part of an adapter that is not known here.
    """
    prefixes = (f"{adapter.peft_type.lower()}_", "lora_", "hada_")
    odd = next((part for part in stem.split(".") if part.startswith(prefixes)), None)
    if odd is not None:
        raise AdapterError(
            f"{adapter.label}: has the tensor {stem}, and {odd} is not known as a part of {adapter.peft_type}; "
            f"{MERGE_IN_PEFT}"
        )
    if tensor.is_floating_point():
        check_finite(stem, tensor)
    # The parameter of an adapted layer lies one level deeper while the adapter is on it.
    return stem.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
