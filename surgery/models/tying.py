"""The configuration of a merged model: labels of the adapter's head, its class, and weights that are no longer tied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from surgery.errors import CheckpointError, listing
from surgery.models.base_model import BaseModel

__all__ = ["check_untied", "tied_groups", "untied_config", "wants_untying"]


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Parameters that are one tensor, under each of their names."""
    groups: dict[str, list[str]] = {}
    for tied, original in getattr(model, "all_tied_weights_keys", {}).items():
        groups.setdefault(original, [original]).append(tied)
    return list(groups.values())


def wants_untying(base: BaseModel, replaced: Mapping[str, torch.Tensor], adapted: Collection[str]) -> list[str]:
    """The parameters that are one tensor in the base and will have different values.

    Args:
        base: the base model.
        replaced: parameters that get new values whole.
        adapted: parameters to which a change is added.
    """
    apart = []
    for group in tied_groups(base.model):
        whole = [replaced[name] for name in group if name in replaced]
        alike = len(whole) == len(group) and all(torch.equal(tensor, whole[0]) for tensor in whole)
        if any(name in adapted for name in group) or (whole and not alike):
            apart += group
    return apart


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration under which embeddings and output head are two tensors."""
    config = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config


def check_untied(base: BaseModel, target: BaseModel, changed: Collection[str]) -> None:
    """Check that the model computes the same with its embeddings apart.

    Raises:
        CheckpointError: it ties them all the same, or its code computes otherwise then.
    """
    name = type(base.model).__name__
    still = [name for group in tied_groups(target.model) for name in group if name in changed]
    if still:
        raise CheckpointError(
            f"{base.folder}: the adapter changes {listing(still, 3)}, which {name} ties to other weights whatever its "
            "configuration says: it cannot be merged, only used as an adapter"
        )
    other = _differences(base.config, target.config)
    if other:
        raise CheckpointError(
            f"{base.folder}: the adapter changes a tied weight, and {name} computes otherwise once it is untied "
            f"({listing(other, 3)}): it cannot be merged, only used as an adapter"
        )


def _differences(one: PretrainedConfig, other: PretrainedConfig) -> list[str]:
    """Settings, other than the tying itself and the labels, that differ between two configurations."""
    ignored = {"tie_word_embeddings", "architectures", "id2label", "label2id", "num_labels", "_name_or_path"}
    found = []
    for key, value in vars(one).items():
        if isinstance(value, PretrainedConfig):
            found += _differences(value, getattr(other, key))
        elif key not in ignored and isinstance(value, (bool, int, float, str)) and getattr(other, key, None) != value:
            found.append(key)
    return found
