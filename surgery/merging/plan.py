"""What a merge will change: which parameters get new values, and where in the base's files they are."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import Contents
from surgery.adapters.fitting import located, sites_on_base, with_place_for
from surgery.adapters.lacking import lacking_in
from surgery.adapters.on_base import ChangesOnBase
from surgery.adapters.tokens import TrainedTokens, tokens_on_base, with_rows
from surgery.errors import AdapterError, CheckpointError, listing
from surgery.merging.report import MergedSite
from surgery.models.base_model import BaseModel
from surgery.models.checkpoint_names import Source, parameter_sources
from surgery.models.labels import raw_config, with_class, with_labels
from surgery.models.loading import lacking_note
from surgery.models.quantized import unquantized_name
from surgery.models.sites import Site
from surgery.models.tying import check_untied, tied_groups, untied_config, wants_untying
from surgery.models.write_back import written_back

__all__ = ["MergePlan", "class_names"]

ROWS = 1024


class MergePlan:
    """An adapter fitted to its base model's files.

    Attributes:
        adapter: the adapter.
        base: the base model as it is.
        target: the base's files under the configuration of the result.
        config: `config.json` of the result, or None where it stays as it is.
        sites: the layers whose weights change, in the model's order -> the adapter's names for them.
        replaced: parameters that the adapter brings whole.
        added: parameters that get a tensor of their own in the files, which they have not in the base's.
        notes: what the user should know.
    """

    def __init__(
        self,
        contents: Contents,
        base: BaseModel,
        target: BaseModel,
        config: dict[str, Any] | None,
        sites: Mapping[Site, str],
        replaced: Mapping[str, torch.Tensor],
        shifts: Mapping[str, torch.Tensor],
        tokens: Mapping[str, TrainedTokens],
        device: torch.device,
    ) -> None:
        self.adapter, self.base, self.target, self.config = contents.adapter, base, target, config
        self.sites, self.replaced, self.device = dict(sites), dict(replaced), device
        self.notes: list[str] = [*contents.adapter.notes, *lacking_in(contents.adapter, base.names).notes]
        self.notes += lacking_note(base, self.replaced)
        self._shifts = dict(shifts)
        self._tokens = dict(tokens)
        self._sites_of: dict[str, list[Site]] = {}
        for site in sites:
            self._sites_of.setdefault(site.parameter, []).append(site)
        self.added = _without_own_tensor(base, target, self._changed)
        self._edited = self._edits()
        self._changes = ChangesOnBase(contents, base, sites, device)
        self._groups: dict[int, dict[str, torch.Tensor]] = {}
        self._figures: dict[str, MergedSite] = {}
        self._check_names()

    @classmethod
    def make(
        cls,
        adapter: Adapter,
        contents: Contents,
        base: BaseModel,
        device: torch.device,
        choose_class: bool,
        trust_remote_code: bool,
    ) -> MergePlan:
        """Fit an adapter to a base model; no weight is changed, and none read but those that recognise the base.

        Args:
            adapter: the adapter.
            contents: what is in it.
            base: the base model, under its own class or the one that the user chose.
            device: where to compute.
            choose_class: take the class of the adapter's task where the base's own class has no place for a tensor.
            trust_remote_code: run model code that comes with the base.

        Raises:
            AdapterError: the adapter does not fit the base.
            CheckpointError: the base is quantised, or cannot hold the result exactly.
            WrongBaseError: the adapter was made from other base weights.
        """
        base.refuse_quantized()
        if choose_class:
            base = with_place_for(base, adapter, contents, trust_remote_code)
        sites = sites_on_base(adapter, base, contents.modules)
        replaced = _replaced(adapter, base, contents.carried)
        shifts = _shifts(contents, base, sites)
        tokens = tokens_on_base(adapter, base)
        both = next((site.module for site in sites if site.parameter in tokens), None)
        if both is not None:
            raise AdapterError(f"{adapter.label}: changes {both} and trains single tokens of it: merge it with PEFT")
        config = with_class(base, with_labels(base, replaced, class_names(adapter)))
        adapted = {*shifts, *(site.parameter for site in sites)}
        untied = wants_untying(base, replaced, adapted)
        target = base
        if untied:
            config = untied_config(config or raw_config(base))
        if config is not None:
            target = base.with_config(base.config_from(config))
        if untied:
            check_untied(base, target, {*replaced, *adapted})
        _check_shapes(adapter, target, replaced)
        plan = cls(contents, base, target, config, sites, replaced, shifts, tokens, device)
        if tokens:
            count = max(len(each.indices) for each in tokens.values())
            plan.notes.append(f"{count} tokens of {listing(tokens, 2)} have the adapter's rows")
        if untied:
            plan.notes.append(f"{listing(untied, 3)} were one tensor and are now apart (tie_word_embeddings is false)")
        plan.notes += _base_note(adapter, base)
        return plan

    @property
    def edited(self) -> Collection[str]:
        """The tensors of the base's files that change."""
        return self._edited.keys()

    def check_shapes(self) -> None:
        """Check every layer's shape as the merge itself does, without reading a weight.

        Raises:
            AdapterError: a layer's change has another shape than its base weight.
        """
        self._changes.check_shapes()

    def shape_of(self, parameter: str) -> tuple[int, ...]:
        """Shape of a parameter of the result."""
        return self.target.shapes[parameter]

    def value(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The new value of an edited tensor of the files or an added parameter, on the CPU.

        Raises:
            CheckpointError: it is not finite in `dtype`.
        """
        if name in self.added:
            return self._parameter(name, dtype)
        source = self._edited[name]
        owners = [parameter for parameter in self._own_changes if self.base.sources[parameter] is source]
        if source.converter is None:
            return self._parameter(owners[0], dtype)
        if id(source) not in self._groups:
            values = {parameter: self._parameter(parameter, dtype) for parameter in owners}
            read = self.base.files.read
            self._groups[id(source)] = written_back(source, self.base.model, lambda key: read(key).to(dtype), values)
        group = self._groups[id(source)]
        value = group.pop(name)  # each is asked for once
        if not group:
            del self._groups[id(source)]
        return value

    def figures(self) -> list[MergedSite]:
        """What was done to each layer, in the model's order."""
        return [self._figures[site.module] for site in self.sites]

    def taken_figures(self) -> dict[str, tuple[float | None, float | None]]:
        """Change and rounding of the layers done so far, by module: what `take` gives to the plan of a later run."""
        return {module: (site.change, site.rounding) for module, site in self._figures.items()}

    def take(self, figures: Mapping[str, tuple[float | None, float | None]]) -> None:
        """Take in the figures of layers that a run before this one has done."""
        for site in self.sites:
            if site.module in figures:
                self._figures[site.module] = MergedSite(
                    site.module, (site.out_features, site.in_features), *figures[site.module]
                )

    @property
    def reshaped(self) -> dict[str, tuple[int, ...]]:
        """Tensors of the base's files that get another shape: a head of another number of labels."""
        sources = self.base.sources
        return {
            key: self.shape_of(parameter)
            for parameter in self.replaced
            if parameter not in self.added and sources[parameter].converter is None
            for key, _ in sources[parameter].keys
            if self.shape_of(parameter) != self.base.shapes[parameter]
        }

    @property
    def _changed(self) -> list[str]:
        return list(dict.fromkeys([*self._sites_of, *self.replaced, *self._shifts, *self._tokens]))

    @property
    def _own_changes(self) -> list[str]:
        return [parameter for parameter in self._changed if parameter not in self.added]

    def _edits(self) -> dict[str, Source]:
        edits: dict[str, Source] = {}
        for parameter in self._own_changes:
            source = self.base.sources[parameter]
            edits.update(dict.fromkeys((key for key, _ in source.keys), source))
        return edits

    def _parameter(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The new value of one parameter on the CPU, in the model's orientation."""
        old = self.replaced[name] if name in self.replaced else self.base.parameter(name)
        sites = self._sites_of.get(name)
        if not old.is_floating_point():
            if sites:
                raise CheckpointError(f"{self.base.folder}: {name} is {old.dtype}, not floating point")
            return old
        if sites:
            value, finite = self._changed_weight(sites, old, dtype)
        else:
            shift = self._shifts.get(name)
            value = (old if shift is None else old.float() + shift).to(dtype)
            finite = bool(torch.isfinite(value).all())
        if name in self._tokens:
            value = with_rows(value, self._tokens[name])
            finite = finite and bool(torch.isfinite(value).all())
        if not finite and not bool(torch.isfinite(value).all()):
            if name not in self.replaced:
                self.base.parameter(name, check=True)  # names a base that is not finite itself
            raise CheckpointError(
                f"{name}: the merged values are not finite in {dtype}; use --dtype bfloat16 or float32"
            )
        return value.cpu()

    def _changed_weight(
        self, sites: Sequence[Site], old: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, bool]:
        """The new value of a parameter that is the weight of one layer, or of several experts, and if it is finite."""
        if sites[0].expert is None:
            value, finite = self._merged(sites[0], sites[0].matrix(old), dtype)
            return sites[0].stored(value), finite
        whole, finite = old.to(dtype, copy=True), True
        for site in sites:
            value, sound = self._merged(site, site.matrix(old), dtype)
            whole[site.expert] = site.stored(value)
            finite = finite and sound
        return whole, finite

    def _merged(self, site: Site, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        """`W + dW (out, in)`, summed in float32 and rounded once, and whether the norms say that it is finite."""
        whole = weight.to(self.device, torch.float32)
        with torch.no_grad():
            value = self._changes.delta(site, whole).dense()
        size, moved = float(torch.linalg.vector_norm(whole)), float(torch.linalg.vector_norm(value))
        stored = value.add_(whole).to(dtype)
        lost = 0.0 if stored is value else _distance(value, stored)
        shape = (site.out_features, site.in_features)
        self._figures[site.module] = MergedSite(
            site.module, shape, moved / size if size else None, lost / moved if moved else None
        )
        return stored, math.isfinite(size + moved + lost)

    def _check_names(self) -> None:
        """Check that the result's files will be read as they are meant.

        Raises:
            CheckpointError: a parameter would come from elsewhere.
        """
        found = parameter_sources(self.target.model, [*self.base.files.files, *self.added])
        for parameter, source in self.base.sources.items():
            expected = [(parameter, parameter)] if parameter in self.added else source.keys
            if parameter in self.target.shapes and found[parameter].keys != expected:
                raise CheckpointError(
                    f"{self.base.folder}: {parameter} would be read from {found[parameter].keys[0][0]}"
                )
        lost = [name for name in self.added if name not in found or found[name].keys != [(name, name)]]
        if lost:
            raise CheckpointError(
                f"{self.base.folder}: its files have no place for {listing(lost, 3)} under the names of "
                f"{type(self.target.model).__name__}"
            )


def _distance(value: torch.Tensor, stored: torch.Tensor) -> float:
    """Norm of the difference to a rounded copy, some rows at a time: neither is to be widened whole."""
    parts = [
        torch.linalg.vector_norm(rows - rounded.float()).double()
        for rows, rounded in zip(value.split(ROWS), stored.split(ROWS), strict=True)
    ]
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def _replaced(adapter: Adapter, base: BaseModel, carried: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """What the adapter brings whole, by parameter of the model.

    Raises:
        AdapterError: the model has no place for it, or the file lacks what its configuration says is saved with it.
    """
    places = {name: located(name, base.shapes, base) for name in carried}
    lost = [name for name, place in places.items() if place is None]
    if lost:
        raise AdapterError(
            f"{adapter.label}: brings {listing(lost, 3)}, for which {type(base.model).__name__} has no place; choose "
            "the class of model with --task"
        )
    if adapter.config.get("modules_to_save") and not carried:
        wanted = listing(adapter.config["modules_to_save"], 3)
        raise AdapterError(f"{adapter.label}: the file lacks what it says was trained and saved with it: {wanted}")
    return {str(place): adapter.tensors[carried[name]] for name, place in places.items()}


def _shifts(contents: Contents, base: BaseModel, sites: Mapping[Site, str]) -> dict[str, torch.Tensor]:
    """Return what the adapter adds to the biases of the layers (`lora_bias`), by parameter."""
    shifts = {}
    for site, module in sites.items():
        own = f"{site.module}.bias"
        bias = contents.output_bias(module, base.parameter(own) if own in base.sources else None)
        if bias is None:
            continue
        parameter = f"{site.module}.bias"
        if parameter not in base.sources:
            raise AdapterError(
                f"{contents.adapter.label}: has a bias for {module}, whose base layer has none to add it to"
            )
        shifts[parameter] = bias
    return shifts


def _without_own_tensor(base: BaseModel, target: BaseModel, changed: Iterable[str]) -> list[str]:
    """Parameters that need a tensor of their own and have none: fresh heads, and what is no longer tied."""
    sources = base.sources
    own = {name for name, source in sources.items() if source.converter is not None or source.first_target == name}
    still_tied = {name for group in tied_groups(target.model) for name in group}
    wanted = [name for name in changed if name not in sources or (name not in own and name not in still_tied)]
    touched = set(changed)
    for group in tied_groups(base.model):
        if touched & set(group):
            wanted += [name for name in group if name not in own and name not in still_tied]
    return list(dict.fromkeys(wanted))


def _check_shapes(adapter: Adapter, target: BaseModel, replaced: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in replaced.items():
        found, expected = tuple(tensor.shape), target.shapes[name]
        if found == expected:
            continue
        advice = "it is for another base model"
        if len(found) == 2 and found[1:] == expected[1:]:
            advice = (
                f"where the vocabulary has grown, resize_token_embeddings({found[0]}) on the base and save it first"
            )
        raise AdapterError(f"{adapter.label}: brings {name} {found}, the base has it {expected}; {advice}")


def _base_note(adapter: Adapter, base: BaseModel) -> list[str]:
    """A note where the adapter names another base model; many are moved, so it decides nothing."""
    named = str(adapter.config.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2]
    given = base.folder.resolve().name if base.folder.is_dir() and base.name == str(base.folder) else base.name
    given = given.partition("@")[0].rstrip("/").rpartition("/")[2]
    original = unquantized_name(str(adapter.config.get("base_model_name_or_path") or "")) or ""
    if not named or given in {named, original.rpartition("/")[2]}:
        return []
    return [f"the adapter names its base {named!r}, and is merged into {given!r}"]


def class_names(adapter: Adapter) -> list[str] | None:
    """The names of the classes of a head that was made with the adapter; None where they are numbers, or unknown."""
    labels = adapter.provenance.get("labels")
    if not isinstance(labels, list) or all(isinstance(label, int) for label in labels):
        return None
    names = [str(label) for label in labels]
    return names if len(set(names)) == len(names) else None
