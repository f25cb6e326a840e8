"""An adapter's weight changes beside the files of its base model, without loading the model.

What the adapter's file leaves out is regenerated from the base, and the base is checked, as in a live model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import who
from surgery.adapters.stock_types import STOCK
from surgery.adapters.weight_change import in_float32, own_config, own_delta, short_names, stock_delta
from surgery.deltas.operators import Delta
from surgery.errors import AdapterError
from surgery.methods.base import OwnMethod, Role, Tensors
from surgery.methods.regeneration import check_base, leaves_out_bases, regenerate
from surgery.methods.registry import method_for_type
from surgery.methods.vera import projections
from surgery.models.base_model import BaseModel
from surgery.models.sites import Site

__all__ = ["ChangesOnBase"]


class ChangesOnBase:
    """The weight changes of an adapter on a base model.

    Args:
        adapter: the adapter.
        base: its base model.
        sites: the adapted layers, in the model's order: site in the base -> the adapter's name for its module.
        device: where to compute.

    Raises:
        WrongBaseError: the adapter was made from other base weights.
    """

    def __init__(self, adapter: Adapter, base: BaseModel, sites: Mapping[Site, str], device: torch.device) -> None:
        self.adapter, self.base, self.device = adapter, base, device
        self._names = dict(sites)
        self._modules = adapter.modules
        self._weights = _FileWeights(base, device)
        self._shared: dict[str, Tensors] = {}
        self._kept: dict[Site, Tensors] = {}
        self._method = None if adapter.peft_type in STOCK else method_for_type(adapter.peft_type)
        self._config: Any = None
        if isinstance(self._method, OwnMethod):
            self._config = own_config(adapter, self._method)
            if self._method.needs_base(self._config):
                check_base(self._method, self._config, _ByKey(base, list(sites)), who=who(adapter))

    def delta(self, site: Site, weight: torch.Tensor) -> Delta:
        """The change of one layer, float32.

        Args:
            site: the layer.
            weight: its base weight `(out, in)`, float32, on the device of the work.

        Raises:
            AdapterError: its tensors are broken, or do not fit the weight.
            WrongBaseError: regenerated bases are not those that the adapter was made with.
        """
        module = self._names[site]
        parts = self._modules[module]
        if self._method is None:
            change = stock_delta(self.adapter, module, parts, weight)
        elif isinstance(self._method, OwnMethod):
            change = self._own(self._method, site, parts, weight)
        else:
            tensors = in_float32({**parts, **self._vera_projections()}, weight.device)
            change = self._method.delta(None, tensors, weight)
        if change.shape != tuple(weight.shape):
            raise AdapterError(
                f"{who(self.adapter)}: changes {module} as a weight of {change.shape[0]} x {change.shape[1]}, the base "
                f"has {weight.shape[0]} x {weight.shape[1]} there: it is for another base model"
            )
        return change

    def _own(self, method: OwnMethod, site: Site, parts: Tensors, weight: torch.Tensor) -> Delta:
        group = [other for other in self._names if method.group_key(other) == method.group_key(site)]
        tensors = short_names(method, parts, weight.device)
        if leaves_out_bases(method, self._config):
            tensors.update(self._regenerated(method, site, group))
        elif method.names(Role.BASE, shared=True):
            tensors.update(self._stored_by_group(method, group))
        needed = weight if method.needs_base(self._config) else None
        return own_delta(method, self._config, tensors, needed, site.module)

    def _regenerated(self, method: OwnMethod, site: Site, group: Sequence[Site]) -> Tensors:
        if site in self._kept:
            return self._kept[site]
        stored = [short_names(method, self._modules[self._names[other]]) for other in group]
        dtype = self.base.raw_weight(site, check=False).dtype
        name = who(self.adapter)
        bases = regenerate(method, self._config, group, stored, self._weights, who=name, dtype=dtype)
        found = [{**bases.shared, **own} for own in bases.own]
        if len(group) > 1:  # the layers of a role are far apart in the files
            self._kept.update(zip(group, found, strict=True))
        return found[group.index(site)]

    def _stored_by_group(self, method: OwnMethod, group: Sequence[Site]) -> Tensors:
        key = method.group_key(group[0])
        if key not in self._shared:
            wanted = set(method.names(Role.BASE, shared=True))
            owners = (short_names(method, self._modules[self._names[other]], self.device) for other in group)
            owner = next((tensors for tensors in owners if wanted <= set(tensors)), None)
            if owner is None:
                raise AdapterError(f"{self._names[group[0]]}: no layer of its role stores {', '.join(sorted(wanted))}")
            shared = {name: owner[name] for name in wanted}
            self._shared[key] = {**shared, **method.shared_derived(self._config, shared)}
        return self._shared[key]

    def _vera_projections(self) -> Tensors:
        stored = self._modules.get("", {})
        if stored:
            return stored
        if not self._shared:
            settings = self.adapter.config
            rank, key = settings.get("r"), settings.get("projection_prng_key")
            if not rank or key is None:
                raise AdapterError(f"{who(self.adapter)}: adapter_config.json lacks r or projection_prng_key")
            A, B = projections(rank, list(self._names), key)
            self._shared[""] = {"vera_A": A, "vera_B": B}
        return self._shared[""]


class _FileWeights:
    """Reads weights from the base's files."""

    def __init__(self, base: BaseModel, device: torch.device) -> None:
        self.base, self.device = base, device

    def __call__(self, site: Site) -> torch.Tensor:
        return self.base.weight(site, self.device)

    def each(self, sites: Sequence[Site]) -> Iterator[torch.Tensor]:
        return map(self, sites)


class _ByKey(Mapping[str, torch.Tensor]):
    """The adapted weights by their keys, read whenever they are looked up, so that one is held at a time."""

    def __init__(self, base: BaseModel, sites: Sequence[Site]) -> None:
        self.base = base
        self.sites = {site.key: site for site in sites}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.base.raw_weight(self.sites[key], check=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)
