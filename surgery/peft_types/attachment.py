"""One adapter of ours inside a model: its sites, what they share, and when it is ready to compute.

An adapter's tensors arrive by several roads: computed by the method's start, loaded by PEFT, loaded by transformers.
None of these roads ends in a common call, so tensors are allocated as NaN, and an adapter is made ready (its base
checked, regenerated tensors regenerated, derived ones computed) as soon as none is left, at the latest when it is
first used. An adapter that never received its tensors says so instead of computing with garbage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from surgery.errors import AdapterError
from surgery.methods.base import OwnMethod
from surgery.methods.regeneration import check_base, leaves_out_bases, regenerate
from surgery.models.fingerprint import Fingerprint
from surgery.models.sites import Site
from surgery.system.tensors import Tensors

__all__ = ["AdaptedLayer", "Attachment", "missing_value"]


class AdaptedLayer(Protocol):
    """What an attachment asks of the layers that it consists of."""

    @property
    def linear(self) -> Any:
        """The linear layer at the bottom."""

    @property
    def device(self) -> torch.device:
        """The device of the base weight."""

    @property
    def is_quantized(self) -> bool:
        """Whether the base layer is a quantised replacement of a linear."""

    def stored(self, adapter_name: str) -> Tensors:
        """Return the tensors that the layer stores in the adapter's file, by short name."""

    def all_tensors(self, adapter_name: str, shared: bool | None = None) -> Tensors:
        """Return the tensors on the layer, by short name; with `shared`, only those that a group shares or not."""

    def set_stored(self, adapter_name: str, tensors: Tensors) -> None:
        """Copy values into the stored tensors."""

    def set_unstored(self, adapter_name: str, tensors: Tensors) -> None:
        """Set tensors that are in no state dict."""

    def cast(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Cast an adapter's floating-point tensors."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters of the layer and of the linear below it."""

    def copy_on(self, device: torch.device, adapter_name: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a shared tensor on another device."""

    def pristine_weight(self) -> torch.Tensor:
        """Return the base weight without any merged adapter, `(out, in)`."""


class Attachment:
    """An adapter's presence in a model.

    Attributes:
        name: the adapter's name in PEFT.
        method: its method.
        config: its configuration.
        layers: the adapted layers by site, in the model's order.
    """

    def __init__(self, name: str, method: OwnMethod, config: Any) -> None:
        self.name = name
        self.method = method
        self.config = config
        self.layers: dict[Site, AdaptedLayer] = {}
        self._owners: dict[str, Site] = {}
        self._ready = False

    def add(self, site: Site, layer: AdaptedLayer) -> bool:
        """Add a layer; returns whether it is the one that holds what its group shares."""
        self.layers[site] = layer
        return self._owners.setdefault(self.method.group_key(site), site) == site

    def owner(self, site: Site) -> AdaptedLayer:
        """The layer that holds the tensors which `site` shares with its group."""
        return self.layers[self._owners[self.method.group_key(site)]]

    @property
    def loaded(self) -> bool:
        """Whether every stored tensor has received its values."""
        return all(_arrived(tensor) for layer in self.layers.values() for tensor in layer.stored(self.name).values())

    def copy_from(self, other: Attachment) -> None:
        """Take all stored tensors from another adapter of the same configuration on the same layers.

        Trainers make a frozen reference so: they add an adapter with the configuration of the one that they train, and
        copy its trained tensors alone.
        """
        with torch.no_grad():
            for site, layer in self.layers.items():
                layer.set_stored(self.name, other.layers[site].stored(other.name))
        self._ready = False

    def forget(self) -> None:
        """Mark all stored tensors as not loaded."""
        for layer in self.layers.values():
            for tensor in layer.stored(self.name).values():
                if tensor.device.type != "meta":
                    tensor.data.fill_(missing_value(tensor.dtype))
        self._ready = False

    def invalidate(self) -> None:
        """Note that stored tensors are about to change: what was derived from them is out of date."""
        self._ready = False

    def start(self) -> None:
        """Compute the method's start from the weights of the live model."""
        if self.method.reads_weights(self.config):
            self._refuse_quantized()
        with torch.no_grad():
            for group in self.method.groups(list(self.layers)):
                stored, _ = self.method.start_group(self.config, group, _LiveWeights(self.layers))
                for site, tensors in zip(group, stored, strict=True):
                    self.layers[site].set_stored(self.name, tensors)
        if self.method.needs_base(self.config):
            self.config.base_fingerprint = self._fingerprint()
        self.config.started = True
        self._ready = False
        self.prepare()

    def prepare(self) -> None:
        """Make the adapter ready to compute; does nothing where it is.

        Raises:
            AdapterError: its tensors never arrived.
            WrongBaseError: the model is not the one that the adapter was made from.
        """
        if self._ready:
            return
        for site, layer in self.layers.items():
            for name, tensor in layer.stored(self.name).items():
                if not _arrived(tensor):
                    raise AdapterError(
                        f"adapter {self.name!r}: {site.module}.{self.method.prefix}{name} was never loaded, or holds "
                        "NaN; open the adapter with PeftModel.from_pretrained, or start afresh with init_weights=True"
                    )
        if self.method.needs_base(self.config):
            self._refuse_quantized()
            self._check_base()
        with torch.no_grad():
            for group in self.method.groups(list(self.layers)):
                self._prepare_group(group)
        self._ready = True

    def tensors(self, site: Site) -> Tensors:
        """All tensors of a site by their short names, its own and its group's, on the site's device."""
        self.prepare()
        layer, owner = self.layers[site], self.owner(site)
        tensors = layer.all_tensors(self.name)
        if owner is not layer:
            device = layer.device
            for name, tensor in owner.all_tensors(self.name, shared=True).items():
                tensors[name] = tensor if tensor.device == device else owner.copy_on(device, self.name, name, tensor)
        return tensors

    def _prepare_group(self, group: list[Site]) -> None:
        method, config, owner = self.method, self.config, self.layers[group[0]]
        if leaves_out_bases(method, config):
            layers = [self.layers[site] for site in group]
            stored = [layer.stored(self.name) for layer in layers]
            dtype = owner.linear.weight.dtype
            weights = _LiveWeights(self.layers)
            bases = regenerate(method, config, group, stored, weights, who=self._who, dtype=dtype)
            for layer, own in zip(layers, bases.own, strict=True):
                layer.set_unstored(self.name, own)
            owner.set_unstored(self.name, bases.shared)
        if config.store_bases:
            owner.set_unstored(self.name, method.shared_derived(config, owner.all_tensors(self.name)))
        for site in group:
            layer = self.layers[site]
            derived = method.derived(config, layer.all_tensors(self.name), layer.pristine_weight)
            layer.set_unstored(self.name, derived)

    @property
    def _who(self) -> str:
        return f"adapter {self.name!r}"

    def _refuse_quantized(self) -> None:
        for site, layer in self.layers.items():
            if layer.is_quantized:
                title = self.method.info.title
                raise AdapterError(
                    f"{site.module}: the layer is quantised; {title} needs the base model's true weights"
                )

    def _fingerprint(self) -> dict[str, str]:
        fingerprint = Fingerprint()
        for site, layer in self.layers.items():
            fingerprint.add(site.key, layer.pristine_weight())
        return fingerprint.digests()

    def _check_base(self) -> None:
        weights = {site.key: layer.pristine_weight() for site, layer in self.layers.items()}
        check_base(self.method, self.config, weights, who=self._who)


class _LiveWeights:
    """Reads weights off the layers of a live model."""

    def __init__(self, layers: dict[Site, AdaptedLayer]) -> None:
        self.layers = layers

    def __call__(self, site: Site) -> torch.Tensor:
        return self.layers[site].pristine_weight().to(torch.float32)

    def each(self, sites: Sequence[Site]) -> Iterator[torch.Tensor]:
        return map(self, sites)


def missing_value(dtype: torch.dtype) -> float | int:
    """Return the value that marks a tensor as not loaded."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _arrived(tensor: torch.Tensor) -> bool:
    if tensor.device.type == "meta":
        return False
    if tensor.numel() == 0:
        return True
    first = tensor.reshape(-1)[0]
    if tensor.is_floating_point():
        return not bool(torch.isnan(first))
    return bool(first != missing_value(tensor.dtype))
