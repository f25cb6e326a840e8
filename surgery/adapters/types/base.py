"""The interface of an adapter type: how its tensors are named and shaped, and which weight change they make.

An entry of the registry is an `AdapterType`. Most types are a table, `TensorType`: the sets of tensors that a layer can
have, and a formula over one layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import torch

from surgery.adapters.types.config_rules import Rule
from surgery.adapters.types.tensor_checks import check_finite
from surgery.deltas.operators import Delta
from surgery.errors import AdapterError, listing
from surgery.models.sites import LINEAR, Form, Site
from surgery.system.tensors import TensorMap
from surgery.system.threads import one_torch_thread

__all__ = [
    "MERGE_IN_PEFT",
    "AdapterFile",
    "AdapterType",
    "BaseWeights",
    "Changes",
    "Formula",
    "Needs",
    "TensorType",
    "in_float32",
]

MERGE_IN_PEFT = "merge it with PEFT (merge_and_unload)"
# (adapter_config.json, the layer's name, its tensors in float32, its base weight in float32 or None)
Formula = Callable[[Mapping[str, Any], str, TensorMap, torch.Tensor | None], Delta]


class Needs(IntEnum):
    """What a weight change needs of the base weight, besides the adapter's own file."""

    NOTHING = 0
    SHAPE = 1
    VALUES = 2


class AdapterFile(Protocol):
    """An adapter as its type sees it: `surgery.adapters.adapter.Adapter` is one."""

    config: dict[str, Any]

    @property
    def label(self) -> str:
        """The adapter's name in messages."""

    def layer(self, module: str) -> TensorMap:
        """Return the tensors of one layer by short name; those above the model for the empty name."""

    def holders(self, short: str) -> list[str]:
        """Return the modules that have a tensor of this short name, in the file's order."""


class BaseWeights(Protocol):
    """The base model under an adapter, as far as a weight change may ask for it.

    Attributes:
        sites: the adapted layers, in the model's order -> the adapter's names for them.
    """

    sites: Mapping[Site, str]

    def __call__(self, site: Site) -> torch.Tensor:
        """Return one weight `(out, in)`, float32, on the device of the work."""

    def each(self, sites: Sequence[Site]) -> Any:
        """Yield the weights of several sites, one at a time."""

    def raw(self, site: Site) -> torch.Tensor:
        """Return one weight `(out, in)` in the dtype of the files."""


class Changes(ABC):
    """The weight changes of one adapter, layer by layer, with what its layers share held once."""

    @abstractmethod
    def delta(self, module: str, weight: torch.Tensor | None = None, site: Site | None = None) -> Delta:
        """Return the change of one layer, float32, `(out, in)`.

        Args:
            module: the adapter's name of the layer.
            weight: its base weight `(out, in)`, where the type needs it.
            site: the layer in the base, where there is a base.

        Raises:
            AdapterError: its tensors are broken, do not fit the weight, or the type needs what is not given.
        """


class AdapterType(ABC):
    """One type of adapter.

    Attributes:
        peft_type: the `peft_type` of its configuration.
        title: its name in its paper.
        paper: where it was published, or None.
        change: its formula for the weight change.
        prefix: what PEFT begins the names of a layer's own parameters with.
        starts_idle: whether it changes nothing at PEFT's default start, so that a layer without tensors is the base's.
        bias_setting: how its configuration says that the biases of the layers which it adapts are trained.
        thin: whether its changes have thin factors, so that a LoRA holds them exactly.
        imported_by: the package that must be imported before PEFT opens it, where PEFT does not know it.
        whole_numbers: whether its tensors may be integers.
        opened_as: `module:function` that brings an adapter of this type, on its loaded model, to the type that is
            opened in its place: `(Adapter, model) -> Adapter`; None where it is opened as it is.
        layers: the kinds of layers that it is read on.
        form_by_base: whether a layer may be a convolution that its tensors do not tell from a linear.
        as_gains: whether its changes are gains on the base weight and thin factors, which packed GiVA holds as such.
        scales_bias: whether what it adds to outputs comes of gains on them, which the layer's own bias has, too.
        rules: the keys of `adapter_config.json` that it reads besides those of every type, with their rules.
    """

    peft_type: str
    title: str
    paper: str | None = None
    change: str | None = None
    prefix: str = ""
    starts_idle: bool = False
    bias_setting: str = "adapter_only"
    thin: bool = True
    imported_by: str | None = None
    whole_numbers: bool = False
    opened_as: str | None = None
    form_by_base: bool = False
    as_gains: bool = False
    scales_bias: bool = False
    layers: tuple[str, ...] = (LINEAR,)
    rules: Mapping[str, Rule] = {}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Return whether a configuration of this `peft_type` is of this variant."""
        return True

    def gains(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """Return what the gains on base weights that a file says are on (rows, outputs, inputs), by module."""
        return {}

    def refuse(self, config: Mapping[str, Any], label: str) -> None:  # noqa: B027 - most types refuse nothing
        """Refuse an adapter whose configuration makes it something that cannot be read exactly.

        Args:
            config: `adapter_config.json`.
            label: the adapter's name in the message.

        Raises:
            AdapterError: it does.
        """

    @property
    def readable(self) -> bool:
        """Whether its weight changes can be read at all."""
        return True

    @abstractmethod
    def needs(self, config: Mapping[str, Any]) -> Needs:
        """Return what its weight changes need of the base weights."""

    @abstractmethod
    def short_name(self, stem: str) -> tuple[str, str] | None:
        """Split a tensor's name into the layer's name and the tensor's name there; None for no tensor of a layer."""

    def unread(self, short: str) -> bool:
        """Return whether a layer with this tensor is of a kind that PEFT reads and this type does not."""
        return False

    @property
    def shared_names(self) -> frozenset[str]:
        """The names of tensors that a file may hold once, above the model, for all layers."""
        return frozenset()

    def lacks_shared(self, file: AdapterFile) -> bool:
        """Return whether a file lacks what its layers share, so that it is drawn again at the shapes of the base."""
        return not all(file.holders(name) for name in self.shared_names)

    @abstractmethod
    def check_layer(self, config: Mapping[str, Any], module: str, tensors: TensorMap) -> None:
        """Check the tensors of one layer, shared ones included: all there, of the right dimensions.

        Raises:
            AdapterError: they are not.
        """

    @abstractmethod
    def changes(self, file: AdapterFile, base: BaseWeights | None) -> Changes:
        """Return the weight changes of an adapter.

        Raises:
            AdapterError: its configuration cannot be used.
            WrongBaseError: it was made from other base weights.
        """

    def form(self, config: Mapping[str, Any], module: str, tensors: TensorMap) -> Form:
        """Return how the weight of a layer is stored, as far as the adapter's own file says; a linear by default."""
        return Form()

    def output_bias(
        self, config: Mapping[str, Any], module: str, tensors: TensorMap, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return what the adapter adds to the outputs of a layer whatever the input, `(out,)` float32, or None.

        Args:
            config: `adapter_config.json`.
            module: the layer's name.
            tensors: the layer's tensors.
            bias: the base layer's own bias, which some types scale; None where it has none or is not known.
        """
        return None

    def check_numbers(self, name: str, tensor: torch.Tensor) -> None:
        """Check that a tensor of this type holds finite numbers of the right kind.

        Raises:
            AdapterError: it does not.
        """
        if not (self.whole_numbers and not tensor.is_floating_point() and not tensor.is_complex()):
            check_finite(name, tensor)


@dataclass(frozen=True)
class TensorType(AdapterType):
    """A type whose layers each have one of a few sets of tensors, and a weight change by one formula over them.

    Attributes:
        layouts: the sets of names that a layer's tensors can have.
        formula: its weight change.
        refused: tensors' names that make a layer something that is not read here -> what it is then.
        dimensions: of the tensors that are not matrices.
        forms: how the weight of a layer is stored, from its tensors; where there is none, every layer is linear.
        base_needs: what the formula needs of the base weight.
        shared: names of tensors that may stand once above the model instead of with each layer.
        regenerated: draws the shared tensors of a file that lacks them, at the shapes of its layers.
        incomplete: what a layer that lacks tensors may be, and the remedy.
        variants: settings that make it another type -> what it is then, and the remedy.
        when: returns whether a configuration is of this variant of its `peft_type`.
        bias: what it adds to a layer's outputs, from its tensors and the layer's own bias.
        may_be_empty: whether a layer may have been pruned to rank 0.
    """

    peft_type: str
    title: str
    layouts: tuple[frozenset[str], ...]
    formula: Formula
    paper: str | None = None
    change: str | None = None
    prefix: str = ""
    starts_idle: bool = False
    bias_setting: str = "adapter_only"
    refused: Mapping[str, str] = field(default_factory=dict)
    dimensions: Mapping[str, int] = field(default_factory=dict)
    base_needs: Needs = Needs.NOTHING
    shared: frozenset[str] = frozenset()
    regenerated: Callable[[Mapping[str, Any], Sequence[Site]], TensorMap] | None = None
    incomplete: str = "the file is incomplete; save the adapter again"
    thin: bool = True
    rules: Mapping[str, Rule] = field(default_factory=dict)
    when: Callable[[Mapping[str, Any]], bool] | None = None
    check: Callable[[Mapping[str, Any], str], None] | None = None
    bias: Callable[[Mapping[str, Any], str, TensorMap, torch.Tensor | None], torch.Tensor | None] | None = None
    may_be_empty: bool = False
    form_by_base: bool = False
    as_gains: bool = False
    scales_bias: bool = False
    layers: tuple[str, ...] = (LINEAR,)
    forms: Callable[[Mapping[str, Any], str, TensorMap], Form] | None = None

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return self.when is None or self.when(config)

    def refuse(self, config: Mapping[str, Any], label: str) -> None:
        if self.check is not None:
            self.check(config, label)

    def needs(self, config: Mapping[str, Any]) -> Needs:
        return self.base_needs

    def short_name(self, stem: str) -> tuple[str, str] | None:
        module, _, last = stem.rpartition(".")
        if last in self.names:
            return module, last
        outer, _, inner = module.rpartition(".")
        short = f"{inner}.{last}"
        return (outer, short) if short in self.names else None

    @property
    def names(self) -> frozenset[str]:
        """Every name that a tensor of a layer can have, refused ones too."""
        return frozenset().union(*self.layouts, self.refused)

    @property
    def shared_names(self) -> frozenset[str]:
        return self.shared

    def unread(self, short: str) -> bool:
        return short in self.refused

    def check_layer(self, config: Mapping[str, Any], module: str, tensors: TensorMap) -> None:
        for name in tensors:
            if name in self.refused:
                raise AdapterError(
                    f"{module}: is {self.refused[name]} ({name}), which is not read here; {MERGE_IN_PEFT}"
                )
        if frozenset(tensors) not in self.layouts:
            wanted = min(self.layouts, key=lambda layout: (len(layout ^ set(tensors)), len(layout)))
            raise AdapterError(
                f"{module}: expected {listing(sorted(wanted))}, found {listing(sorted(tensors))}; {self.incomplete}"
            )
        form = self.form(config, module, tensors)
        for name, tensor in tensors.items():
            expected = self.dimensions.get(name, 2)
            # What a form other than a linear's asks of the dimensions, the formula checks.
            wrong = tensor.ndim != expected and form.kind == LINEAR and not (self.form_by_base and tensor.ndim == 4)
            if wrong or (0 in tensor.shape and not self.may_be_empty):
                kind = "is a convolution" if tensor.ndim > expected else "is no matrix"
                raise AdapterError(
                    f"{module}: {kind} ({name} has shape {tuple(tensor.shape)}), only linear layers are read; save the "
                    f"adapter without it, or {MERGE_IN_PEFT}"
                )
        if self.base_needs is Needs.NOTHING:
            self.formula(config, module, tensors, None)  # the shapes fit, the scale is known

    def form(self, config: Mapping[str, Any], module: str, tensors: TensorMap) -> Form:
        return Form() if self.forms is None else self.forms(config, module, tensors)

    def changes(self, file: AdapterFile, base: BaseWeights | None) -> Changes:
        return _TensorChanges(self, file, base)

    def output_bias(
        self, config: Mapping[str, Any], module: str, tensors: TensorMap, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        return None if self.bias is None else self.bias(config, module, tensors, bias)


class _TensorChanges(Changes):
    """The changes of a `TensorType`: each layer stands for itself."""

    def __init__(self, kind: TensorType, file: AdapterFile, base: BaseWeights | None) -> None:
        self.kind, self.file = kind, file
        self.drawn: TensorMap = {}
        if base is not None and kind.regenerated is not None and kind.lacks_shared(file):
            self.drawn = kind.regenerated(file.config, list(base.sites))

    def delta(self, module: str, weight: torch.Tensor | None = None, site: Site | None = None) -> Delta:
        kind, config = self.kind, self.file.config
        parts = {**self.drawn, **with_shared(kind, self.file, self.file.layer(module))}
        whole = weight.float() if weight is not None else None
        with one_torch_thread():  # checks and conversions of thin factors, bound by memory
            kind.check_layer(config, module, parts)
            for name, tensor in parts.items():
                kind.check_numbers(f"{module}.{name}", tensor)
            tensors = in_float32(parts, whole.device if whole is not None else "cpu")
        return kind.formula(config, module, tensors, whole)


def with_shared(kind: AdapterType, file: AdapterFile, tensors: TensorMap) -> dict[str, torch.Tensor]:
    """Return a layer's tensors together with those that the file holds once for all layers."""
    if not kind.shared_names:
        return dict(tensors)
    above = file.layer("")
    return {**{name: above[name] for name in kind.shared_names if name in above}, **tensors}


def in_float32(tensors: TensorMap, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Return tensors on a device, floating-point ones in float32."""
    return {name: (t.float() if t.is_floating_point() else t).to(device) for name, t in tensors.items()}
