"""Which linear layers of a model are adapted, and what each is called.

A `Site` is one adapted linear. Sites are read off the modules of a model, whose parameters may live on the meta
device: only names, classes and shapes are looked at.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.errors import TargetError, listing

__all__ = ["Site", "linear_sites", "role_by_name", "select_sites", "site_of", "target_modules", "unsupported_modules"]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Site:
    """One linear layer that an adapter can change.

    Attributes:
        module: the module's name in the model, `bert.encoder.layer.0.attention.self.query`.
        key: the same without the prefix that a model class with a head adds, so that it names the same layer in
            the bare model and in every class built on it.
        role: `key` with the block index replaced by `*`: layers of one role do the same work in every block.
        layer: index of the repeated block, or None outside the repeated blocks.
        out_features: rows of the weight in `(out, in)` orientation.
        in_features: columns of the weight in `(out, in)` orientation.
        transposed: the checkpoint stores `(in, out)`, as `Conv1D` does.
    """

    module: str
    key: str
    role: str
    layer: int | None
    out_features: int
    in_features: int
    transposed: bool = False

    @property
    def parameter(self) -> str:
        """Name of the weight in the model's state dict."""
        return f"{self.module}.weight"

    @property
    def max_rank(self) -> int:
        """The largest rank that a matrix of this shape can have."""
        return min(self.out_features, self.in_features)


def site_of(model: nn.Module, name: str, module: nn.Module) -> Site:
    """Describe the linear `module`, called `name` inside `model`.

    Raises:
        TargetError: `module` is neither `nn.Linear` nor `Conv1D`.
    """
    if _is_conv1d(module):
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        in_features, out_features = weight.shape
    elif isinstance(module, nn.Linear):
        in_features, out_features = module.in_features, module.out_features
    else:
        raise TargetError(f"{name}: {type(module).__name__} is not a linear layer (nn.Linear or Conv1D)")
    prefix = getattr(model, "base_model_prefix", "")
    key = name.removeprefix(f"{prefix}.") if prefix else name
    index = _block_index(model, name)
    role, layer = key, None
    if index is not None:
        parts = name.split(".")
        layer = int(parts[index])
        role = ".".join([*parts[:index], "*", *parts[index + 1 :]])
        role = role.removeprefix(f"{prefix}.") if prefix else role
    return Site(name, key, role, layer, int(out_features), int(in_features), _is_conv1d(module))


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
