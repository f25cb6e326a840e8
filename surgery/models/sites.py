"""Which layers of a model are adapted, what each is called, and how its weight is a matrix `(out, in)`.

A `Site` is one adapted layer: a linear, an embedding, a convolution, a matrix that a module of another class holds, or
one expert of a parameter of three dimensions. Sites are read off the modules of a model, whose parameters may live on
the meta device: only names, classes and shapes are looked at.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from surgery.errors import TargetError, listing

__all__ = [
    "CONVOLUTION",
    "EMBEDDING",
    "EXPERT",
    "LINEAR",
    "PARAMETER",
    "PLAIN",
    "Form",
    "Site",
    "adaptable_sites",
    "expert_sites",
    "linear_sites",
    "role_by_name",
    "select_sites",
    "site_of",
    "target_modules",
    "unsupported_modules",
]

ALL_LINEAR = "all-linear"
# Kinds of layers.
LINEAR, EMBEDDING, CONVOLUTION = "linear", "embedding", "convolution"
# A matrix, or one of several in a parameter of three dimensions, that a module of another class holds.
PARAMETER, EXPERT = "parameter", "expert"


@dataclass(frozen=True)
class Form:
    """How the weight of a layer is stored, as far as an adapter's file has to know.

    Attributes:
        kind: `linear`, `embedding`, `convolution`, `parameter`, `expert`.
        kernel: sizes of a convolution's kernel; empty for the others.
    """

    kind: str = LINEAR
    kernel: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.kind + (f" {'x'.join(map(str, self.kernel))}" if self.kernel else "")

    @classmethod
    def parsed(cls, text: str) -> Form | None:
        """Return the form that `str` gives this text; None for no such text."""
        kind, _, sizes = text.partition(" ")
        if kind == CONVOLUTION and re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", sizes):
            return cls(kind, tuple(int(size) for size in sizes.split("x")))
        return cls(kind) if kind in {LINEAR, EMBEDDING, PARAMETER, EXPERT} and not sizes else None


PLAIN = Form()


@dataclass(frozen=True)
class Site:
    """One layer that an adapter can change.

    Attributes:
        module: the module's name in the model, `bert.encoder.layer.0.attention.self.query`.
        key: the same without the prefix that a model class with a head adds, so that it names the same layer in
            the bare model and in every class built on it.
        role: `key` with the block index replaced by `*`: layers of one role do the same work in every block.
        layer: index of the repeated block, or None outside the repeated blocks.
        out_features: rows of the weight in `(out, in)` orientation.
        in_features: columns of the weight in `(out, in)` orientation.
        transposed: the checkpoint stores `(in, out)`, as `Conv1D` and embeddings do.
        form: its kind, and what else an adapter's file has to know of how the weight is stored.
        expert: which matrix of a parameter of three dimensions it is; None for a layer with a weight of its own.
        held_as: name of the parameter that is or holds the weight, where that is not the module's `weight`.
    """

    module: str
    key: str
    role: str
    layer: int | None
    out_features: int
    in_features: int
    transposed: bool = False
    form: Form = PLAIN
    expert: int | None = None
    held_as: str | None = None

    @property
    def parameter(self) -> str:
        """Name of the weight in the model's state dict; experts share one."""
        return f"{self.module}.weight" if self.held_as is None else self.held_as

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the layer's matrix `(out, in)` in a tensor of the parameter's shape: a view of it."""
        own = stored if self.expert is None else stored[self.expert]
        if self.form.kernel:
            return own.flatten(1)
        return own.T if self.transposed else own

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix `(out, in)` in the shape of the layer's weight, or of one expert's."""
        if self.form.kernel:
            return matrix.reshape(matrix.shape[0], -1, *self.form.kernel)
        return matrix.T if self.transposed else matrix

    @property
    def max_rank(self) -> int:
        """The largest rank that a matrix of this shape can have."""
        return min(self.out_features, self.in_features)


def site_of(model: nn.Module, name: str, module: nn.Module) -> Site:
    """Describe the layer `module`, called `name` inside `model`.

    Raises:
        TargetError: `module` is no linear layer, embedding or convolution.
    """
    form, transposed = Form(), False
    if _is_conv1d(module):
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        (in_features, out_features), transposed = weight.shape, True
    elif isinstance(module, nn.Linear):
        in_features, out_features = module.in_features, module.out_features
    elif isinstance(module, nn.Embedding):
        in_features, out_features = module.num_embeddings, module.embedding_dim
        form, transposed = Form(EMBEDDING), True
    elif isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        out_features, in_features = module.weight.shape[0], math.prod(module.weight.shape[1:])
        form = Form(CONVOLUTION, tuple(module.kernel_size))
    else:
        raise TargetError(f"{name}: {type(module).__name__} is not a linear layer (nn.Linear or Conv1D)")
    return Site(name, *_described(model, name), int(out_features), int(in_features), transposed, form)


def expert_sites(model: nn.Module, name: str, parameter: torch.Tensor) -> list[Site]:
    """Describe a parameter of a module that is no linear layer: one matrix, or one for each expert.

    Args:
        model: the model.
        name: the parameter's name in it.
        parameter: of two dimensions, or of three with the experts first.
    """
    owner, _, short = name.rpartition(".")
    if parameter.ndim == 2:
        module = owner if short == "weight" else name
        out_features, in_features = parameter.shape
        return [Site(module, *_described(model, module), out_features, in_features, False, Form(PARAMETER), None, name)]
    transposed = bool(getattr(_module_below(model, owner), "is_transposed", False))
    count, height, width = parameter.shape
    sizes = (width, height) if transposed else (height, width)
    key, role, layer = _described(model, name)
    return [
        Site(f"{name}.{i}", f"{key}.{i}", f"{role}.*", layer, *sizes, transposed, Form(EXPERT), i, name)
        for i in range(count)
    ]


def _module_below(model: nn.Module, name: str) -> nn.Module:
    """Return a module of a model, or the one that a wrapper of it holds."""
    module: Any = model.get_submodule(name)
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module


def _described(model: nn.Module, name: str) -> tuple[str, str, int | None]:
    """Return the name without the prefix of a class with a head, the role, and the index of the block."""
    prefix = getattr(model, "base_model_prefix", "")
    key = name.removeprefix(f"{prefix}.") if prefix else name
    index = _block_index(model, name)
    if index is None:
        return key, key, None
    parts = name.split(".")
    role = ".".join([*parts[:index], "*", *parts[index + 1 :]])
    return key, role.removeprefix(f"{prefix}.") if prefix else role, int(parts[index])


def role_by_name(module: str) -> tuple[str, int | None]:
    """Role and block of a module where there is no model to ask: the first number in its name is the block's index."""
    parts = module.split(".")
    position = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if position is None:
        return module, None
    return ".".join([*parts[:position], "*", *parts[position + 1 :]]), int(parts[position])


def linear_sites(model: nn.Module) -> list[Site]:
    """Every linear layer of `model` that can be adapted, in the model's own order."""
    refused = unsupported_modules(model)
    return [
        site_of(model, name, module)
        for name, module in model.named_modules()
        if _is_linear(module) and name not in refused
    ]


def adaptable_sites(model: nn.Module) -> list[Site]:
    """Every layer of `model` whose weight an adapter can change, of every kind, in the model's own order."""
    never_called = {
        f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    }
    return [
        site
        for name, module in model.named_modules()
        if name not in never_called
        for site in _sites(model, name, module)
    ]


def _sites(model: nn.Module, name: str, module: nn.Module) -> Iterator[Site]:
    """Yield the layers that one module is or holds."""
    if _is_conv1d(module) or isinstance(module, (nn.Linear, nn.Embedding, _ConvNd)):
        if not isinstance(module, _ConvTransposeNd):
            yield site_of(model, name, module)
        return
    for short, parameter in module.named_parameters(recurse=False):
        if name and parameter.ndim in {2, 3} and min(parameter.shape) > 1:
            yield from expert_sites(model, f"{name}.{short}", parameter)


def unsupported_modules(model: nn.Module) -> dict[str, str]:
    """Names of weights that do a linear layer's work but cannot be adapted, with the reason for each."""
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            refused[f"{name}.out_proj"] = "nn.MultiheadAttention never calls this layer's forward"
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding)):
            continue
        linear = _is_linear(module)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                refused[f"{name}.{parameter_name}"] = "fused 3-D expert weights"
            elif parameter.ndim == 2 and parameter_name == "weight" and not linear:
                refused[name] = f"{type(module).__name__} is not a linear layer"
    return refused


def select_sites(model: nn.Module, targets: Sequence[str] = ()) -> list[Site]:
    """The sites that `targets` name, in the model's order.

    Args:
        model: the model, possibly on the meta device.
        targets: each a module name or the end of one at a dot (`q_proj`, `attention.output.dense`), a regular
            expression for the whole module name, or `all-linear`. Empty means `all-linear`: every linear of the
            repeated blocks.

    Raises:
        TargetError: a target matches nothing, only modules that are not linear, or is no valid expression; or
            the model has no repeated blocks and no target was given.
    """
    sites = linear_sites(model)
    if not targets:
        targets = [ALL_LINEAR]
    refused = unsupported_modules(model)
    chosen: set[str] = set()
    for target in targets:
        matched = _matching_sites(sites, target)
        blocked = [name for name in refused if target != ALL_LINEAR and _name_matches(name, target)]
        if blocked:
            raise TargetError(f"target {target!r}: {blocked[0]} cannot be adapted ({refused[blocked[0]]})")
        if not matched:
            raise TargetError(_no_match_message(model, sites, target))
        chosen.update(matched)
    return [site for site in sites if site.module in chosen]


def target_modules(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """The shortest list for PEFT's `target_modules` that matches exactly these sites in `model`."""
    return shortest_targets(model, [site.module for site in sites])


def shortest_targets(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """The shortest list for PEFT's `target_modules` that matches exactly these modules of `model`.

    PEFT takes an entry as a module's name or as the end of one at a dot. For each role the shortest ending is
    chosen that matches no module outside `sites`; where there is none, the full names are listed.
    """
    names = set(modules)
    others = [name for name, _ in model.named_modules() if name and name not in names]
    entries: set[str] = set()
    for name in sorted(names):
        if any(name == entry or name.endswith(f".{entry}") for entry in entries):
            continue
        parts = name.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        safe = (
            ending for ending in endings if not any(other == ending or other.endswith(f".{ending}") for other in others)
        )
        entries.add(next(safe, name))
    return sorted(entries)


def _block_index(model: nn.Module, name: str) -> int | None:
    """Position in the dotted name of the first index into an `nn.ModuleList`: the repeated block."""
    module: Any = model
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if isinstance(module, nn.ModuleList) and part.isdigit():
            return position
        module = getattr(module, part)
    return None


def _name_matches(name: str, target: str) -> bool:
    if re.fullmatch(r"[\w.]+", target):
        return name == target or name.endswith(f".{target}")
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise TargetError(f"target {target!r} is not a valid regular expression: {error}") from None


def _matching_sites(sites: Sequence[Site], target: str) -> list[str]:
    if target == ALL_LINEAR:
        return [site.module for site in sites if site.layer is not None]
    return [site.module for site in sites if _name_matches(site.module, target)]


def _no_match_message(model: nn.Module, sites: Sequence[Site], target: str) -> str:
    available = listing(sorted({site.role for site in sites}), limit=24)
    if not sites:
        return f"{type(model).__name__} has no linear layer that can be adapted"
    if target == ALL_LINEAR:
        return f"{type(model).__name__} has no repeated blocks; name its layers with --target. Available: {available}"
    others = [f"{n} ({type(m).__name__})" for n, m in model.named_modules() if n and _name_matches(n, target)]
    if others:
        return f"target {target!r} matches no linear layer, only {listing(others, 3)}. Available: {available}"
    return f"target {target!r} matches no module. Available: {available}"


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' `Conv1D`; before transformers is imported none is."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)
