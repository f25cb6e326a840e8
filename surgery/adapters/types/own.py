"""The PEFT types of our methods: one reader for all of them, since a method says its tensors, shapes and formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from surgery.adapters.types.base import AdapterFile, AdapterType, BaseWeights, Changes, Needs, in_float32
from surgery.adapters.types.config_rules import OWN_RULES
from surgery.deltas.operators import Delta
from surgery.errors import AdapterError, MethodError, SurgeryError, listing
from surgery.methods.base import OwnMethod, Role
from surgery.methods.regeneration import check_base, leaves_out_bases, regenerate
from surgery.methods.registry import method_for_type
from surgery.models.sites import Form, Site
from surgery.system.tensors import TensorMap

__all__ = ["OwnAdapterType", "own_delta", "own_type"]

STORED = (Role.TRAINABLE, Role.KEPT, Role.BASE)


class OwnAdapterType(AdapterType):
    """The PEFT type of a method of ours.

    Args:
        method: the method.
    """

    imported_by = "surgery"
    whole_numbers = True  # positions, cuts, orders, checks
    rules = OWN_RULES

    def __init__(self, method: OwnMethod) -> None:
        self.method = method
        self.peft_type = method.info.peft_type
        self.title, self.paper, self.change = method.info.title, method.info.paper, method.info.change
        self.thin, self.prefix = method.thin, method.prefix
        self.layers = method.layers
        self.scales_bias = True  # by gains alone do they add to outputs

    def needs(self, config: Mapping[str, Any]) -> Needs:
        on_base = self.method.uses_weight(config) or config.get("store_bases") is False
        return Needs.VALUES if on_base else Needs.NOTHING

    def gains(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        return self.method.gains(config)

    def short_name(self, stem: str) -> tuple[str, str] | None:
        module, _, last = stem.rpartition(".")
        return (module, last) if last.startswith(self.method.prefix) else None

    def check_layer(self, config: Mapping[str, Any], module: str, tensors: TensorMap) -> None:
        roles = (Role.TRAINABLE, Role.KEPT) if config.get("store_bases") is False else STORED
        wanted = [f"{self.method.prefix}{name}" for name in self.method.names(*roles, shared=False, config=config)]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise AdapterError(f"{module}: the file lacks {listing(missing)}; save the adapter again")

    def form(self, config: Mapping[str, Any], module: str, tensors: TensorMap) -> Form:
        text = (config.get("kinds") or {}).get(module)
        form = Form() if text is None else Form.parsed(text)
        if form is None:
            raise AdapterError(f"{module}: adapter_config.json gives it the kind {text!r:.80}, which is not known")
        return form

    def changes(self, file: AdapterFile, base: BaseWeights | None) -> Changes:
        return _OwnChanges(self, file, base)

    def output_bias(
        self, config: Mapping[str, Any], module: str, tensors: TensorMap, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        own = {name.removeprefix(self.method.prefix): tensor for name, tensor in tensors.items()}
        return self.method.output_bias(config, module, own, bias)


@cache
def own_type(peft_type: str) -> OwnAdapterType | None:
    """Return the adapter type of the method of ours with this PEFT type; None where there is no such method."""
    method = method_for_type(peft_type)
    return OwnAdapterType(method) if isinstance(method, OwnMethod) else None


class _OwnChanges(Changes):
    """The weight changes of an adapter of ours: what its file leaves out is regenerated, and the base is checked."""

    def __init__(self, kind: OwnAdapterType, file: AdapterFile, base: BaseWeights | None) -> None:
        self.kind, self.method, self.file, self.base = kind, kind.method, file, base
        self.config = _own_config(file, kind.method)
        self._shared: dict[str, dict[str, torch.Tensor]] = {}
        self._regenerated_by_site: dict[Site, TensorMap] = {}
        if base is not None and self.method.needs_base(self.config):
            check_base(self.method, self.config, _RawByKey(base), who=file.label)

    def delta(self, module: str, weight: torch.Tensor | None = None, site: Site | None = None) -> Delta:
        parts = self.file.layer(module)
        self.kind.check_layer(self.file.config, module, parts)
        for name, tensor in parts.items():
            self.kind.check_numbers(f"{module}.{name}", tensor)
        if leaves_out_bases(self.method, self.config) and (site is None or self.base is None):
            raise AdapterError("the adapter stores no bases; open it with surgery.load, which regenerates them")
        if weight is None and (self.method.needs_base(self.config) or self.method.uses_weight(self.config)):
            raise AdapterError(f"the weight change of {self.method.info.title} needs the base weight")
        whole = weight.float() if weight is not None else None
        device = whole.device if whole is not None else torch.device("cpu")
        tensors = self._short_names(parts, device)
        if leaves_out_bases(self.method, self.config):
            assert site is not None
            tensors.update(self._regenerated(site))
        elif self.method.names(Role.BASE, shared=True):
            tensors = {**self._shared_by_group(module, site, device), **tensors}
        reads = self.method.needs_base(self.config) or self.method.uses_weight(self.config)
        needed = whole if reads or self.base is None else None
        return own_delta(self.method, self.config, tensors, needed, module)  # by the name in the configuration

    def _short_names(self, parts: TensorMap, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        return in_float32({name.removeprefix(self.method.prefix): tensor for name, tensor in parts.items()}, device)

    def _group(self, site: Site) -> list[Site]:
        assert self.base is not None
        return [other for other in self.base.sites if self.method.group_key(other) == self.method.group_key(site)]

    def _regenerated(self, site: Site) -> TensorMap:
        assert self.base is not None
        if site in self._regenerated_by_site:
            return self._regenerated_by_site[site]
        group = self._group(site)
        stored = [self._short_names(self.file.layer(self.base.sites[other])) for other in group]
        dtype = self.base.raw(site).dtype
        bases = regenerate(self.method, self.config, group, stored, self.base, who=self.file.label, dtype=dtype)
        found = [{**bases.shared, **own} for own in bases.own]
        if len(group) > 1:  # the layers of a role are far apart in the files
            self._regenerated_by_site.update(zip(group, found, strict=True))
        return found[group.index(site)]

    def _shared_by_group(self, module: str, site: Site | None, device: torch.device) -> TensorMap:
        """Return what the layers of a group share, with what is derived from it."""
        owner = self._owner(module) if site is None or self.base is None else self._owner_of_group(site)
        if owner not in self._shared:
            found = self._short_names(self.file.layer(owner), device)
            shared = {name: found[name] for name in self.method.names(Role.BASE, shared=True)}
            self._shared[owner] = {**shared, **self.method.shared_derived(self.config, shared)}
        return self._shared[owner]

    def _owner_of_group(self, site: Site) -> str:
        assert self.base is not None
        wanted = {f"{self.method.prefix}{name}" for name in self.method.names(Role.BASE, shared=True)}
        modules = [self.base.sites[other] for other in self._group(site)]
        owner = next((module for module in modules if wanted <= set(self.file.layer(module))), None)
        if owner is None:
            names = ", ".join(sorted(name.removeprefix(self.method.prefix) for name in wanted))
            raise AdapterError(f"{modules[0]}: no layer of its role stores {names}")
        return owner

    def _owner(self, module: str) -> str:
        """Return the layer that stores what `module` shares: its name differs in the block's number, and it fits."""
        first = self.method.names(Role.BASE, shared=True)[0]
        stored = f"{self.method.prefix}{first}"
        width = self.file.layer(module)[f"{self.method.prefix}{self.method.names(Role.KEPT)[0]}"].shape[0]
        parts = module.split(".")
        for candidate in self.file.holders(stored):
            others = candidate.split(".")
            if candidate == module:
                return candidate
            if len(parts) != len(others) or self.file.layer(candidate)[stored].shape[0] != width:
                continue
            different = [(a, b) for a, b in zip(parts, others, strict=True) if a != b]
            if len(different) == 1 and all(text.isdigit() for text in different[0]):
                return candidate
        raise AdapterError(f"{module}: no module stores the {first} that it shares")


class _RawByKey(Mapping[str, torch.Tensor]):
    """The adapted weights by their keys, read whenever they are looked up, so that one is held at a time."""

    def __init__(self, base: BaseWeights) -> None:
        self.base = base
        self.sites = {site.key: site for site in base.sites}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.base.raw(self.sites[key])

    def __iter__(self) -> Any:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def _own_config(file: AdapterFile, method: OwnMethod) -> Any:
    """Return the configuration of an adapter of ours as its method's class.

    Raises:
        AdapterError: it holds values that PEFT or the method does not take.
    """
    known = {field.name for field in dataclasses.fields(method.config_class)}
    try:
        return method.config_class(**{key: value for key, value in file.config.items() if key in known})
    except SurgeryError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise AdapterError(f"adapter_config.json: {str(error).strip() or type(error).__name__:.300}") from None


def own_delta(
    method: OwnMethod, config: Any, tensors: dict[str, torch.Tensor], weight: torch.Tensor | None, module: str
) -> Delta:
    """Return the weight change of one layer of ours, from all its stored tensors.

    Args:
        method: the adapter's method.
        config: its configuration.
        tensors: by short name, shared and regenerated ones included.
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


def _check_own(
    method: OwnMethod, config: Any, tensors: dict[str, torch.Tensor], weight: torch.Tensor | None, module: str
) -> None:
    wanted = method.names(Role.TRAINABLE, Role.KEPT, Role.BASE, config=config)
    missing = [f"{method.prefix}{name}" for name in wanted if name not in tensors]
    if missing:
        raise AdapterError(f"{module}: the file lacks {listing(missing)}")
    site = _site_like(method, tensors, weight, module)
    try:
        shapes = method.file_shapes(config, site, tensors)
        whole = {name for name in wanted if not method.dtype(name, site).is_floating_point}
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MethodError) as error:
        raise AdapterError(f"{module}: adapter_config.json does not fit its tensors ({error})") from None
    for name in wanted:
        found, called = tensors[name], f"{module}.{method.prefix}{name}"
        if tuple(found.shape) != shapes[name]:
            raise AdapterError(f"{called} has shape {tuple(found.shape)}, adapter_config.json says {shapes[name]}")
        if found.is_floating_point() == (name in whole) or found.is_complex():
            raise AdapterError(f"{called} is {found.dtype}, expected {'whole' if name in whole else 'real'} numbers")


def _site_like(method: OwnMethod, tensors: dict[str, torch.Tensor], weight: torch.Tensor | None, module: str) -> Site:
    """Return the layer that tensors are for, by the weight or by the tensors that are as high and as wide."""

    def size(names: tuple[str, ...], axis: int) -> int:
        if weight is not None:
            return int(weight.shape[axis])
        found = next((tensors[name] for name in names if name in tensors and tensors[name].ndim), None)
        return int(found.shape[axis]) if found is not None else 0

    return Site(module, module, module, None, size(method.high, 0), size(method.wide, -1))
