"""What an adapter of ours leaves out of its file: regenerated from its base model, and recognised.

One code for adapters in a live model and for adapters that are worked on beside the base's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from surgery.errors import AdapterError, WrongBaseError
from surgery.methods.base import CHECK, Bases, OwnMethod, Role, WeightReader
from surgery.models.fingerprint import matches
from surgery.models.sites import Site
from surgery.system.tensors import Tensors

__all__ = ["check_base", "leaves_out_bases", "regenerate"]


def leaves_out_bases(method: OwnMethod, config: Any) -> bool:
    """Whether an adapter's file lacks the method's frozen bases."""
    return not config.store_bases and bool(method.names(Role.BASE, config=config))


def regenerate(
    method: OwnMethod,
    config: Any,
    group: Sequence[Site],
    stored: Sequence[Tensors],
    weights: WeightReader,
    *,
    who: str,
    dtype: torch.dtype,
) -> Bases:
    """The frozen bases of one group of sites, computed again and compared with what the file says of them.

    Args:
        method: the adapter's method.
        config: its configuration.
        group: sites that share bases, in the model's order.
        stored: what the file holds for each of them, by short name.
        weights: reads the base weights.
        who: what an error calls the adapter.
        dtype: in which the base weights are at hand.

    Raises:
        WrongBaseError: they are not the bases that the adapter was made with.
    """
    bases = method.bases(config, group, weights)
    for site, tensors, own in zip(group, stored, bases.own, strict=True):
        if CHECK not in tensors or method.agrees(tensors[CHECK], {**bases.shared, **own}):
            continue
        reason = "the base model, or this machine's arithmetic, differs"
        if dtype != torch.float32:
            reason = f"the base is loaded in {dtype}; load it in float32 for an adapter without stored bases"
        raise WrongBaseError(
            f"{who}: the bases regenerated at {site.module} are not those it was made with: {reason}. "
            "Adapters made without --no-store-bases do not depend on it"
        )
    return bases


def check_base(method: OwnMethod, config: Any, weights: Mapping[str, torch.Tensor], *, who: str) -> None:
    """Check that an adapter's base weights are those it was made from.

    Args:
        method: the adapter's method, one that needs its base.
        config: its configuration, with the fingerprint.
        weights: the adapted base weights `(out, in)` by `Site.key`; they are looked up several times, never kept.
        who: what an error calls the adapter.

    Raises:
        AdapterError: the configuration has no fingerprint.
        WrongBaseError: the weights are others.
    """
    if not config.base_fingerprint:
        raise AdapterError(f"{who}: its configuration lacks base_fingerprint")
    if not matches(config.base_fingerprint, weights):
        name = config.base_model_name_or_path or "the one it was made from"
        raise WrongBaseError(
            f"{who} ({method.info.title}) was made from other base weights: its base is "
            f"{name}, and the weights of this model's adapted layers differ from it"
        )
