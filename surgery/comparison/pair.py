"""Two adapters of one base side by side: which layers each changes, under common names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.contents import Contents, contents_of
from surgery.adapters.lacking import lacking_in
from surgery.adapters.tokens import ROWS, tokens_on_base, with_rows
from surgery.adapters.types.lora import BIAS_NAME
from surgery.deltas.operators import Delta
from surgery.errors import AdapterError, listing
from surgery.models.sites import Site, role_by_name
from surgery.system.threads import one_torch_thread

if TYPE_CHECKING:
    from surgery.adapters.on_base import ChangesOnBase
    from surgery.models.base_model import BaseModel

__all__ = ["Layer", "Pair", "Side"]

# A layer's base weight `(out, in)`, float32, on the device of the work.
WeightOf = Callable[[Site], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer that at least one of the two changes.

    Attributes:
        module: its name, the base's where there is one, else A's.
        role: the same with the block's index replaced by `*`.
        layer: the block's index, or None outside the blocks.
        site: the layer in the base, where there is one.
    """

    module: str
    role: str
    layer: int | None
    site: Site | None = None


@dataclass
class Side:
    """One adapter of the pair.

    Attributes:
        adapter: it.
        contents: what is in its file.
        names: the pair's name for a layer -> the adapter's.
        notes: what its file lacks of what its configuration names.
        carried: what it brings whole, by the pair's name for the parameter; biases of LoRA's B among them, each under
            the name of its tensor.
    """

    adapter: Adapter
    contents: Contents
    names: dict[str, str] = field(default_factory=dict)
    carried: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: ChangesOnBase | None = None  # with a base
    base: BaseModel | None = None

    def delta(self, layer: Layer, weight: torch.Tensor | None) -> Delta | None:
        """Its change of a layer, or None where it has none."""
        name = self.names.get(layer.module)
        if name is None:
            return None
        if self.changes is None:
            with one_torch_thread():  # conversions and checks, bound by memory
                return self.adapter.delta(name)
        assert layer.site is not None and weight is not None
        return self.changes.delta(layer.site, weight)

    def bias(self, layer: Layer) -> torch.Tensor | None:
        """Return what it adds to the layer's output whatever the input (`lora_bias`), `(out,)`, or None."""
        name = self.names.get(layer.module)
        if name is None:
            return None
        own = f"{layer.module}.bias"
        known = self.base is not None and own in self.base.sources
        return self.contents.output_bias(name, self.base.parameter(own) if known and self.base is not None else None)


class Pair:
    """Two adapters of one base.

    Attributes:
        a: the reference.
        b: the other.
        base: their base model under a class that has a place for all they bring, with A's number of labels; or None.
        layers: what either changes, in the model's order, or that of A's file.
        same: B is A: the same settings, and the same tensors to the last bit.
        relabelled: the base's configuration says another number of labels than the adapters' heads have.
        notes: what the user should know.
    """

    def __init__(self, a: Side, b: Side, base: BaseModel | None, layers: Sequence[Layer], relabelled: bool) -> None:
        self.a, self.b, self.base, self.layers, self.relabelled = a, b, base, list(layers), relabelled
        self.same = a.adapter.same_as(b.adapter)
        self.notes = [*_file_notes(a, b), *_base_notes(a, b, base), *_one_sided(a, b, self.layers)]

    @classmethod
    def open(
        cls,
        a: Adapter,
        b: Adapter,
        base: str | None,
        task: str | None,
        device: torch.device,
        trust_remote_code: bool,
    ) -> Pair:
        """Match the layers of two adapters.

        Args:
            a: the reference.
            b: the other.
            base: their base model, a folder or a Hub id.
            task: chooses the model class; default the base's own, or that of the adapters' task where only that one
                has a place for what they bring.
            device: where to compute.
            trust_remote_code: run model code that comes with the base.

        Raises:
            AdapterError: an adapter cannot be read exactly, needs a base, does not fit it, or they have no layer in
                common.
            WrongBaseError: an adapter was made from other base weights.
        """
        with one_torch_thread():
            sides = (Side(a, contents_of(a)), Side(b, contents_of(b)))
        if base is None:
            for side in sides:
                side.notes += lacking_in(side.adapter).notes
        if base is None:
            for side in sides:
                adapter = side.adapter
                if side.contents.needs:
                    raise AdapterError(
                        f"{adapter.label}: the weight change of a {adapter.peft_type} adapter depends on its base "
                        "model: give it with --base"
                    )
            return _by_name(*sides)
        from surgery.adapters.fitting import with_place_for  # these bring transformers, which files alone do not need
        from surgery.models.base_model import BaseModel

        opened = BaseModel.open(base, task, trust_remote_code)
        opened.refuse_quantized()
        if task is None:
            for side in sides:
                opened = with_place_for(opened, side.adapter, side.contents, trust_remote_code)
        for side in sides:
            side.notes += lacking_in(side.adapter, opened.names).notes
        return _on_base(*sides, opened, device)

    def deltas(self, weight_of: WeightOf | None) -> Iterator[tuple[Layer, Delta | None, Delta | None]]:
        """The changes of each layer, A's and B's, float32; None where an adapter leaves it alone.

        Where B is A, the same object is both: what is regenerated twice may differ in the last bits.

        Args:
            weight_of: the base weights; not needed without a base.

        Raises:
            AdapterError: the two disagree about the layer's shape.
        """
        for layer in self.layers:
            weight = weight_of(layer.site) if weight_of is not None and layer.site is not None else None
            ours = self.a.delta(layer, weight)
            theirs = ours if self.same else self.b.delta(layer, weight)
            if ours is not None and theirs is not None and ours.shape != theirs.shape:
                raise AdapterError(
                    f"{layer.module}: {self.a.adapter.label} changes it as {ours.shape[0]} x {ours.shape[1]}, "
                    f"{self.b.adapter.label} as {theirs.shape[0]} x {theirs.shape[1]}: they are for different bases"
                )
            yield layer, ours, theirs

    def values(self, side: Side) -> dict[str, torch.Tensor]:
        """What an adapter brings whole, for the model's parameters; biases of LoRA's B are part of its changes."""
        return {name: tensor for name, tensor in side.carried.items() if not name.endswith(f".{BIAS_NAME}")}

    def lacking(self) -> dict[str, torch.Tensor]:
        """Values for parameters that the base's files lack, or have for another number of labels: A's, else B's."""
        assert self.base is not None
        sources = self.base.sources
        brought = {**self.values(self.b), **self.values(self.a)}
        return {
            name: tensor
            for name, tensor in brought.items()
            if name not in sources or (self.relabelled and not name.startswith(self._body))
        }

    def head(self) -> dict[str, torch.Tensor]:
        """A's head, where the model's task has one."""
        assert self.base is not None
        from surgery.models.heads import HEAD_TASKS

        if self.base.task is None or self.base.task.name not in HEAD_TASKS:
            return {}
        return {name: tensor for name, tensor in self.values(self.a).items() if not name.startswith(self._body)}

    def check_answers(self) -> list[str]:
        """Check that both can run on one model.

        Returns:
            Notes on what one of them, or neither, brings.

        Raises:
            AdapterError: they bring a parameter in different shapes, or in another than the base's.
        """
        assert self.base is not None
        for side in (self.a, self.b):
            for name, tensor in self.values(side).items():
                expected = self.base.shapes[name]
                if tuple(tensor.shape) != expected:
                    raise AdapterError(
                        f"{side.adapter.label}: brings {name} {tuple(tensor.shape)}, where {expected} is needed beside "
                        "the other adapter and the base: their answers cannot be compared; leave out --data"
                    )
        brought = self.lacking()
        notes = []
        for letter, side, other in (("A", self.a, "B"), ("B", self.b, "A")):
            lent = sorted({name.rpartition(".")[0] for name in brought if name not in side.carried})
            if lent:
                notes.append(f"{letter} brings no {listing(lent, 3)}: it answers with {other}'s")
        from surgery.models.heads import missing_modules

        drawn = [name for name in missing_modules(self.base) if not any(n.startswith(f"{name}.") for n in brought)]
        if drawn:
            missing = listing(drawn, 3)
            notes.append(f"the base's files lack {missing}, and neither adapter brings it: drawn at random for both")
        return notes

    @property
    def _body(self) -> str:
        assert self.base is not None
        return f"{self.base.model.base_model_prefix}."


def _by_name(a: Side, b: Side) -> Pair:
    """Match without a base: the names are equal, or differ by the prefix of a class with a head."""
    renamed = _renaming(a.contents.modules, b.contents.modules)
    a.names = {name: name for name in a.contents.modules}
    b.names = {renamed(name): name for name in b.contents.modules}
    for side, rename in ((a, str), (b, renamed)):
        rows = {f"{module}.{ROWS}": key for module, key in side.contents.tokens.items()}
        for parameter, key in {**side.contents.carried, **rows}.items():
            name = rename(parameter)
            side.carried[name if name in a.contents.carried else parameter] = side.adapter.tensors[key]
    names = dict.fromkeys([*a.names, *b.names])
    return _checked(a, b, None, [Layer(name, *role_by_name(name)) for name in names], False)


def _renaming(ours: Collection[str], theirs: Collection[str]) -> Callable[[str], str]:
    """From B's names to A's."""
    if set(ours) & set(theirs):
        return str
    mine, yours = ({name.partition(".")[0] for name in names} for names in (ours, theirs))
    if len(mine) == 1:
        prefix = next(iter(mine))
        if any(f"{prefix}.{name}" in ours for name in theirs):
            return lambda name: f"{prefix}.{name}"
    if len(yours) == 1:
        prefix = f"{next(iter(yours))}."
        return lambda name: name.removeprefix(prefix)
    return str


def _on_base(a: Side, b: Side, base: BaseModel, device: torch.device) -> Pair:
    from surgery.adapters.fitting import sites_on_base
    from surgery.adapters.on_base import ChangesOnBase
    from surgery.models.labels import with_labels

    sites: dict[Site, None] = {}
    for side in (a, b):
        side.carried = _carried_on(base, side)
    config = with_labels(base, {**b.carried, **a.carried})
    if config is not None:
        base = base.with_config(type(base.config).from_dict(copy.deepcopy(config)))
    for side in (a, b):
        found = sites_on_base(side.adapter, base, side.contents.modules)
        side.changes, side.base = ChangesOnBase(side.contents, base, found, device), base
        side.names = {site.module: name for site, name in found.items()}
        sites.update(dict.fromkeys(found))
    order = {name: number for number, (name, _) in enumerate(base.model.named_modules())}

    def place(site: Site) -> tuple[int, str, int]:
        owner = site.module if site.module in order else site.parameter.rpartition(".")[0]
        # Matrices of the files that transformers joins come last, under their own names.
        return order.get(owner, len(order)), site.parameter, site.expert or 0

    layers = [Layer(s.module, s.role, s.layer, s) for s in sorted(sites, key=place)]
    return _checked(a, b, base, layers, config is not None)


def _checked(a: Side, b: Side, base: BaseModel | None, layers: list[Layer], relabelled: bool) -> Pair:
    if not set(a.names) & set(b.names):
        raise AdapterError(
            f"{a.adapter.label} and {b.adapter.label} change no layer in common ({listing(a.contents.modules, 2)}; "
            f"{listing(b.contents.modules, 2)}): they are for different bases"
        )
    for side in (a, b):
        for layer in layers:
            bias = side.bias(layer)
            if bias is not None:
                side.carried[f"{layer.module}.{BIAS_NAME}"] = bias
    return Pair(a, b, base, layers, relabelled)


def _carried_on(base: BaseModel, side: Side) -> dict[str, torch.Tensor]:
    from surgery.adapters.fitting import located

    places = {name: located(name, base.shapes, base) for name in side.contents.carried}
    lost = [name for name, place in places.items() if place is None]
    if lost:
        raise AdapterError(
            f"{side.adapter.label}: brings {listing(lost, 3)}, for which {type(base.model).__name__} has no place; "
            "choose the class of model with --task"
        )
    found = {str(place): side.adapter.tensors[side.contents.carried[name]] for name, place in places.items()}
    for parameter, tokens in tokens_on_base(side.adapter, base).items():
        found[parameter] = with_rows(found.get(parameter, base.parameter(parameter)), tokens)
    return found


def _file_notes(a: Side, b: Side) -> list[str]:
    """Return what the user should know of the two files; what holds for both is said once."""
    said = {letter: [*side.adapter.notes, *side.notes] for letter, side in (("A", a), ("B", b))}
    of_both = [note for note in said["A"] if note in said["B"]]
    alone = [f"{letter}: {note}" for letter, notes in said.items() for note in notes if note not in of_both]
    return [*(f"A and B: {note}" for note in of_both), *alone]


def _base_notes(a: Side, b: Side, base: BaseModel | None) -> list[str]:
    """A note where the recorded names of the base differ; many are moved, so it decides nothing."""
    said = {
        f"{letter} names its base": _short(side.adapter.config.get("base_model_name_or_path"))
        for letter, side in (("A", a), ("B", b))
    }
    if base is not None:
        said["the base given is"] = _short(base.folder.resolve() if base.name == str(base.folder) else base.name)
    known = {who: name for who, name in said.items() if name}
    if len(set(known.values())) < 2:
        return []
    return [f"{', '.join(f'{who} {name!r}' for who, name in known.items())}: taken for one"]


def _short(name: Any) -> str:
    return str(name or "").partition("@")[0].rstrip("/").rpartition("/")[2]


def _one_sided(a: Side, b: Side, layers: Sequence[Layer]) -> list[str]:
    notes = []
    for name, side, other in (("A", a, b), ("B", b, a)):
        alone = [layer.module for layer in layers if layer.module in side.names and layer.module not in other.names]
        if alone:
            notes.append(f"{len(alone)} layers are changed by {name} alone and count in full: {listing(alone, 3)}")
    return notes
