"""An adapter's weight changes beside the files of its base model, without loading the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from surgery.adapters.contents import Contents
from surgery.adapters.types.base import Needs, TensorType
from surgery.deltas.operators import Delta
from surgery.errors import AdapterError
from surgery.models.base_model import BaseModel
from surgery.models.sites import Site

__all__ = ["ChangesOnBase"]


class ChangesOnBase:
    """The weight changes of an adapter on a base model.

    What the adapter's file leaves out is regenerated from the base, and the base is checked, as in a live model.

    Args:
        contents: the adapter.
        base: its base model.
        sites: the adapted layers, in the model's order: site in the base -> the adapter's name for its module.
        device: where to compute.

    Raises:
        WrongBaseError: the adapter was made from other base weights.
    """

    def __init__(self, contents: Contents, base: BaseModel, sites: Mapping[Site, str], device: torch.device) -> None:
        self.label, self.base, self._contents = contents.adapter.label, base, contents
        self._names = dict(sites)
        self._changes = contents.type.changes(contents.adapter, _FileWeights(base, self._names, device))

    def delta(self, site: Site, weight: torch.Tensor) -> Delta:
        """Return the change of one layer, float32.

        Args:
            site: the layer.
            weight: its base weight `(out, in)`, float32, on the device of the work.

        Raises:
            AdapterError: its tensors are broken, or do not fit the weight.
            WrongBaseError: regenerated bases are not those that the adapter was made with.
        """
        module = self._names[site]
        change = self._changes.delta(module, weight, site)
        if site.expert is not None and change.shape[::-1] == tuple(weight.shape) != change.shape:
            # PEFT 0.18 took in and out of fused experts the other way round.
            change = change.transposed()
        if change.shape != tuple(weight.shape):
            raise AdapterError(
                f"{self.label}: changes {module} as a weight of {change.shape[0]} x {change.shape[1]}, the base "
                f"has {weight.shape[0]} x {weight.shape[1]} there: it is for another base model"
            )
        return change

    def check_shapes(self) -> None:
        """Check that every change has the shape of its base weight, without reading a weight.

        Types whose change is made of the base's values are recognised by the base's fingerprint instead.

        Raises:
            AdapterError: one has not.
        """
        if self._contents.needs is Needs.VALUES and not isinstance(self._contents.type, TensorType):
            return
        for site in self._names:
            # One number seen as a matrix takes no memory; ones, since DoRA divides by the norms of rows.
            self.delta(site, torch.ones(1).expand(site.out_features, site.in_features))


class _FileWeights:
    """The weights in the base's files."""

    def __init__(self, base: BaseModel, sites: Mapping[Site, str], device: torch.device) -> None:
        self.base, self.sites, self.device = base, sites, device

    def __call__(self, site: Site) -> torch.Tensor:
        return self.base.weight(site, self.device)

    def each(self, sites: Sequence[Site]) -> Iterator[torch.Tensor]:
        return map(self, sites)

    def raw(self, site: Site) -> torch.Tensor:
        return self.base.raw_weight(site, check=False)
