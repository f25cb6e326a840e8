"""The module that replaces one with fused experts: each expert's matrix has an adapter layer of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from surgery.methods.base import OwnMethod
from surgery.models.sites import Site
from surgery.peft_types.layer import AdapterLayer

__all__ = ["ExpertsLayer"]


class ExpertView(nn.Module):
    """One expert's matrix in a parameter of three dimensions, as a layer's `weight`; nothing of it is registered.

    Args:
        owner: the module that holds the parameter.
        parameter: its name there.
        expert: the expert's index.
    """

    def __init__(self, owner: nn.Module, parameter: str, expert: int) -> None:
        super().__init__()
        self.place = (owner, parameter, expert)  # a tuple: the owner is no child of this module

    bias = None

    @property
    def weight(self) -> torch.Tensor:
        """The matrix, as the parameter holds it."""
        owner, parameter, expert = self.place
        whole: torch.Tensor = getattr(owner, parameter)
        return whole[expert]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("an expert is computed by the module that holds it")


class ExpertLayer(AdapterLayer):
    """The adapter of one expert: it holds tensors and makes a weight change, and is never called."""

    def __init__(self, owner: nn.Module, parameter: str, method: OwnMethod, site: Site) -> None:
        assert site.expert is not None
        view = ExpertView(owner, parameter, site.expert)
        super().__init__(view, method, dataclasses.replace(site, expert=None))

    def write_weight(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.linear.weight.copy_(value)

    def change(self) -> torch.Tensor | None:
        """The change of the expert by all active adapters, in the parameter's orientation; None where there is none."""
        if self.disable_adapters or self.merged:
            return None
        deltas = [self.delta(name) for name in self._active() if name in self.attachments]
        if not deltas:
            return None
        total = deltas[0].dense()
        for delta in deltas[1:]:
            total = total + delta.dense()
        return self.site.stored(total)


class ExpertsLayer(nn.Module):
    """A module of experts whose parameters are changed while it runs.

    Args:
        base_layer: the module.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapted: list[str] = []

    def add(self, parameter: str, site: Site, method: OwnMethod) -> ExpertLayer:
        """Return the adapter layer of one expert, made where it is not there yet."""
        if parameter not in self.adapted:
            self.adapted.append(parameter)
            self._modules[parameter] = nn.ModuleDict()  # `add_module` takes the experts' own attribute for one here
        layers: Any = self._modules[parameter]
        if str(site.expert) not in layers:
            layers[str(site.expert)] = ExpertLayer(self.base_layer, parameter, method, site)
        layer: ExpertLayer = layers[str(site.expert)]
        return layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What the model asks of its experts.
            return getattr(super().__getattr__("base_layer"), name)

    def layers(self, parameter: str) -> dict[int, ExpertLayer]:
        """The adapter layers of a parameter, by expert."""
        held: Any = self._modules[parameter]
        return {int(index): layer for index, layer in held.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        changed = {}
        for parameter in self.adapted:
            layers = self.layers(parameter)
            # Outside of a layer's own call PEFT's switches are seen here.
            for layer in layers.values():
                if layer.disable_adapters and layer.merged:
                    layer.unmerge()
            changes = {index: layer.change() for index, layer in layers.items()}
            if all(change is None for change in changes.values()):
                continue
            whole: torch.Tensor = getattr(self.base_layer, parameter)
            zero = torch.zeros_like(whole[0])
            parts = [changes.get(index) for index in range(whole.shape[0])]
            changed[parameter] = whole + torch.stack([zero if part is None else part.to(whole.dtype) for part in parts])
        if not changed:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, changed, args, kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts themselves, with the adapters merged if wanted."""
        for parameter in self.adapted:
            for layer in self.layers(parameter).values():
                layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.base_layer
