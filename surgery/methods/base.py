"""What a method of our own PEFT types supplies: its tensors, its start, and its weight change.

Everything else (files, the PEFT layer, merging, the command line) is written once for all of them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Protocol

import torch
from peft import PeftConfig

from surgery.deltas.operators import Delta
from surgery.errors import MethodError
from surgery.linalg.seeded import sketch
from surgery.methods.catalogue import MethodInfo
from surgery.methods.own_types import add_method, peft_type_member
from surgery.models.sites import LINEAR, Site
from surgery.storage.format_version import FIRST_VERSION, check_format_version
from surgery.system.tensors import Tensors

__all__ = ["CHECK", "Bases", "Method", "OwnConfig", "OwnMethod", "Role", "Spec", "WeightReader"]

# Stored in place of the bases: what recognises a regenerated copy of them.
CHECK = "check"
# Relative to a base's norm. Regenerating on other hardware moves the sketch by about 1e-6; one column of 4096
# with the wrong sign moves it by about 1e-2.
CHECK_TOLERANCE = 1e-3


class WeightReader(Protocol):
    """Gives the weights of sites, `(out, in)`, float32, on the device the work is done on."""

    def __call__(self, site: Site) -> torch.Tensor:
        """The weight of one site."""

    def each(self, sites: Sequence[Site]) -> Iterator[torch.Tensor]:
        """The weights of several sites, one at a time; the next may be read while one is worked on."""


@dataclass
class Bases:
    """The frozen bases of one group of sites.

    Attributes:
        shared: what the sites share; what is derived from it may come along where it falls off on the way.
        own: what each site has for itself, in order.
        notes: what the user should know about how they were computed.
    """

    shared: Tensors = field(default_factory=dict)
    own: list[Tensors] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Start:
    """An adapter at its method's start.

    Attributes:
        tensors: by their names in the file, without `base_model.model.`; a leading dot marks names that sit above
            the model, at `base_model`.
        notes: what the user should know about how they were computed.
    """

    tensors: Tensors
    notes: list[str] = field(default_factory=list)


class Role(Enum):
    """What a tensor is to an adapter."""

    TRAINABLE = "trained, stored"
    KEPT = "frozen, always stored"
    BASE = "frozen, stored or regenerated from the base model or a seed"
    DERIVED = "computed on load, never stored"


@dataclass(frozen=True)
class Spec:
    """One tensor of an adapter: its name, what it is, and whether the sites of a group share it."""

    name: str
    role: Role
    shared: bool = False


@dataclass
class OwnConfig(PeftConfig):
    """What all our PEFT configurations hold.

    An adapter must survive a trainer that knows only `save_pretrained`, which keeps configuration and tensors and
    nothing else; so everything needed to load it safely is here.

    Attributes:
        info: the row of a method whose PEFT type it is.
    """

    info: ClassVar[MethodInfo]
    only_where_used: ClassVar[frozenset[str]] = frozenset(
        {"gains", "kinds", "target_parameters", "trainable_token_indices"}
    )
    started = False  # no field: whether an adapter has been started from it

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names, endings of module names, or one regular expression."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, named like target_modules."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input while training."})
    bias: str = field(default="none", metadata={"help": "Which biases train: 'none', 'all' or 'adapter_only'."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Kept for PEFT's sake; Conv1D layers are recognised by their class."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the adapter that train and are saved with it."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; all if None."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, for layers_to_transform."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters of fused experts, each of which has an adapter of its own."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose rows of the embedding train, and are saved with the adapter."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Compute the method's start. Saved adapters say False: theirs is in the file."}
    )
    store_bases: bool = field(
        default=True, metadata={"help": "Store the frozen bases, or regenerate and check them on load."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything drawn at random."})
    base_fingerprint: dict[str, str] | None = field(
        default=None, metadata={"help": "Digests of the adapted base weights, by dtype."}
    )
    format_version: int = field(default=FIRST_VERSION, metadata={"help": "Version of this layout of files."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type_member(self.info.peft_type)
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` is given without `layers_to_transform`")
        check_format_version(self.format_version, "adapter_config.json")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration; what only some files use is left out of the others, which older readers open."""
        found: dict[str, Any] = super().to_dict()
        return {key: value for key, value in found.items() if value is not None or key not in self.only_where_used}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`.

        Beside an adapter's tensors it says that the start need not be computed: PEFT saves those in inference mode,
        transformers saves those of an adapter that has started. A configuration saved alone is written as it is.
        """
        stored = copy.copy(self)
        stored.init_weights = self.init_weights and not (self.inference_mode or self.started)
        if isinstance(stored.target_modules, (set, frozenset)):
            stored.target_modules = sorted(stored.target_modules)
        super(OwnConfig, stored).save_pretrained(save_directory, **kwargs)


class Method(ABC):
    """An adapter method.

    Attributes:
        info: its row in the table of methods.
    """

    info: MethodInfo

    @abstractmethod
    def make_config(self, options: dict[str, Any], common: dict[str, Any]) -> PeftConfig:
        """The PEFT configuration for the options of `surgery init`.

        Raises:
            MethodError: an option is out of range.
        """

    def complete(self, options: dict[str, Any], sites: Sequence[Site], model_config: Any) -> dict[str, Any]:
        """The options with what depends on the model: defaults for its type, sizes for its layers.

        Raises:
            MethodError: an option does not fit the model.
        """
        return options

    def gradient_parts(self, config: Any, sites: Sequence[Site]) -> tuple[int, dict[str, list[int]]]:
        """For a method that reads gradients: the singular triplets it wants of each, and the heights of the parts of
        fused layers by module name.
        """
        raise NotImplementedError(f"{self.info.title} reads no gradients")

    @abstractmethod
    def start(self, config: Any, sites: Sequence[Site], weight: WeightReader | None) -> Start:
        """The adapter at its start. A method that reads no weights may be given no reader."""

    @abstractmethod
    def delta(self, config: Any, tensors: Tensors, weight: torch.Tensor | None, module: str = "") -> Delta:
        """The weight change of a site, from all its tensors and, where the method needs it, its base weight.

        `module` is the site's name, for methods whose configuration says something about single modules.
        """

    def notes(self, config: Any, sites: Sequence[Site]) -> list[str]:
        """What the user should know about the choice of options for these sites."""
        if getattr(config, "store_bases", True):
            return []
        return ["the frozen bases are not stored: they are computed again, and checked, whenever the adapter is loaded"]

    @property
    @abstractmethod
    def trainable_names(self) -> list[str]:
        """What the trained tensors of a site are called in the file, after the module's name."""

    @property
    def passes(self) -> int:
        """How many times the start reads each weight."""
        return 1 if self.info.reads_weights else 0

    def rank_at(self, config: Any, site: Site) -> int | None:
        """The adapter's rank at a site; None for a method without one."""
        rank = getattr(config, "r", None)
        return None if rank is None else min(rank, site.max_rank)


class OwnMethod(Method):
    """A method whose PEFT type is ours.

    Attributes:
        config_class: its configuration.
        specs: its tensors.
    """

    config_class: type[OwnConfig]
    specs: tuple[Spec, ...]
    # Whether the kept tensors come from the weights, as against all else that a start may come from.
    keeps_from_weights = True
    # Whether a change depends on the values of the base weight.
    on_base_weight = False
    # Whether a change has thin factors.
    thin = True
    # The kinds of layers that it is on.
    layers: tuple[str, ...] = (LINEAR,)
    # The tensors that are as high, and as wide, as the layer's weight.
    high: tuple[str, ...] = ("B",)
    wide: tuple[str, ...] = ("A",)
    # Whether its changes have a form in which training multiplies base and change at once (`Delta.adapted`).
    trains_as_one = False

    def __init__(self, info: MethodInfo) -> None:
        self.info = info
        add_method(info, self)

    @property
    def prefix(self) -> str:
        """What the names of its tensors start with in a state dict."""
        return f"{self.info.peft_type.lower()}_"

    @property
    def trainable_names(self) -> list[str]:
        return [f"{self.prefix}{name}" for name in self.names(Role.TRAINABLE)]

    @abstractmethod
    def shapes(self, config: Any, site: Site) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor (not the derived ones) at a site."""

    def file_shapes(self, config: Any, site: Site, tensors: Tensors) -> dict[str, tuple[int, ...]]:
        """Return the shape that each stored tensor of a file should have, for a method whose files say some of them."""
        return self.shapes(config, site)

    def dtype(self, name: str, site: Site) -> torch.dtype:
        """Dtype in which a tensor of a site is held; that of the file may be a narrower float."""
        return torch.int64 if name == CHECK else torch.float32

    def bases(self, config: Any, sites: Sequence[Site], weight: WeightReader) -> Bases:
        """The frozen bases of one group of sites."""
        return Bases(own=[{} for _ in sites])

    def approximation(self, config: Any, tensors: Tensors) -> Delta | None:
        """What in the start approximates the base weight, for a method of which that is the point."""
        return None

    def kept(self, config: Any, site: Site, bases: Tensors, weight: torch.Tensor | None) -> Tensors:
        """The small frozen tensors that are always stored, from the site's bases and its weight.

        The weight is None for a method that keeps no such tensors.
        """
        return {}

    def shared_derived(self, config: Any, bases: Tensors) -> Tensors:
        """What a group computes from its shared bases once, on load."""
        return {}

    def derived(self, config: Any, tensors: Tensors, weight: Callable[[], torch.Tensor]) -> Tensors:
        """What a site computes from its stored tensors and its weight, on load."""
        return {}

    def held(self, config: Any, tensors: Tensors, weight: torch.Tensor) -> Tensors:
        """What a site holds while it is trained, for the `adapted` of its change: from all its tensors and weight."""
        return {}

    def output_bias(self, config: Any, module: str, tensors: Tensors, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Return what an adapter adds to a layer's outputs whatever the input, `(out,)` float32, or None.

        Args:
            config: its configuration, an object or the content of `adapter_config.json`.
            module: the layer's name.
            tensors: the layer's, by short name.
            bias: the base layer's own bias; None where it has none or is not known.
        """
        return None

    @abstractmethod
    def trainables(self, config: Any, site: Site, frozen: Tensors) -> Tensors:
        """The trainable tensors at the start, where the weight change is zero."""

    def reads_weights(self, config: Any) -> bool:
        """Whether the start depends on the values of the base weights."""
        return self.info.reads_weights

    def group_key(self, site: Site) -> str:
        """Sites of one key share the shared tensors; the first of them stores these."""
        return site.key

    def needs_base(self, config: Any) -> bool:
        """Whether an adapter computes something else on another base model, so that the base must be checked."""
        return self.on_base_weight

    def gains(self, config: Any) -> dict[str, str]:
        """What gains on the base weight are on, by module; `config` is an object, or the content of the file."""
        return {}

    def uses_weight(self, config: Any) -> bool:
        """Whether a change is made of the base weight's values; `config` is an object, or the content of the file."""
        return self.on_base_weight

    def specs_for(self, config: Any) -> tuple[Spec, ...]:
        """The tensors of an adapter with this configuration, an object or the content of `adapter_config.json`."""
        return self.specs

    def names(self, *roles: Role, shared: bool | None = None, config: Any = None) -> list[str]:
        """Names of the tensors of these roles, optionally only the shared or only the unshared ones.

        Args:
            roles: the roles.
            shared: only those that a group shares, or only the others.
            config: a configuration, for those of its variant; None for those of all variants.
        """
        specs = self.specs if config is None else self.specs_for(config)
        return [s.name for s in specs if s.role in roles and shared in (None, s.shared)]

    def stored(self, config: Any, owner: bool) -> list[str]:
        """Names of what the file holds for a site; the owner of a group also holds what the group shares."""
        roles = (Role.TRAINABLE, Role.KEPT, Role.BASE) if config.store_bases else (Role.TRAINABLE, Role.KEPT)
        names = [s.name for s in self.specs_for(config) if s.role in roles and (owner or not s.shared)]
        own = bool(self.names(Role.BASE, shared=False, config=config))
        if not config.store_bases and (own or (owner and self.names(Role.BASE, config=config))):
            names.append(CHECK)
        return names

    def groups(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Sites by `group_key`, in order."""
        grouped: dict[str, list[Site]] = {}
        for site in sites:
            grouped.setdefault(self.group_key(site), []).append(site)
        return list(grouped.values())

    def check(self, bases: Tensors) -> torch.Tensor:
        """What recognises a copy of the bases: a sketch of each, `(number of bases, 9)`.

        The float64 values are kept as int64 bits, so that no cast of a model to half precision touches them.
        """
        return torch.stack([sketch(bases[name]) for name in self.names(Role.BASE)]).view(torch.int64)

    def agrees(self, check: torch.Tensor, bases: Tensors) -> bool:
        """Whether these bases are the ones that `check` was made from, up to rounding."""
        expected, found = check.cpu().view(torch.float64), self.check(bases).view(torch.float64)
        scale = expected[:, :1].abs().clamp_min(torch.finfo(torch.float64).tiny)
        return bool(((found - expected).abs() <= CHECK_TOLERANCE * scale).all())

    def start_group(self, config: Any, sites: Sequence[Site], weight: WeightReader) -> tuple[list[Tensors], list[str]]:
        """What the sites of one group store at the start, by short name, and the notes.

        The first site also has the shared tensors.
        """
        bases = self.bases(config, sites, weight)
        shared = bases.shared
        if not set(self.names(Role.DERIVED, shared=True)) <= set(shared):
            shared = {**shared, **self.shared_derived(config, shared)}
        keeps = self.keeps_from_weights and bool(self.names(Role.KEPT, config=config))
        weights = weight.each(sites) if keeps else iter(())
        result = []
        for index, site in enumerate(sites):
            frozen = {**shared, **bases.own[index]}
            frozen.update(self.kept(config, site, frozen, next(weights) if keeps else None))
            tensors = {**frozen, **self.trainables(config, site, frozen)}
            if not config.store_bases and self.names(Role.BASE, config=config):
                tensors[CHECK] = self.check(frozen)
            names = self.stored(config, owner=index == 0)
            result.append({name: tensors[name] for name in names})
        return result, bases.notes

    def start(self, config: Any, sites: Sequence[Site], weight: WeightReader | None) -> Start:
        assert weight is not None
        start = Start({})
        for group in self.groups(sites):
            stored, notes = self.start_group(config, group, weight)
            start.notes += notes
            for site, tensors in zip(group, stored, strict=True):
                for name, tensor in tensors.items():
                    # Copied: equal starting values must be tensors of their own in the file.
                    start.tensors[f"{site.module}.{self.prefix}{name}"] = tensor.detach().to("cpu", copy=True)
        return start


def positive_rank(rank: Any) -> int:
    """Check a rank.

    Raises:
        MethodError: it is not a positive whole number.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise MethodError(f"rank must be a whole number of at least 1, got {rank!r}")
    return rank


def capped_rank_note(rank: int, sites: Sequence[Site]) -> list[str]:
    """A note naming the sites at which a rank is capped at min(in, out)."""
    small = [site for site in sites if site.max_rank < rank]
    if not small:
        return []
    least = min(site.max_rank for site in small)
    return [f"rank {rank} is capped at min(in, out) in {len(small)} of {len(sites)} layers (down to {least})"]
