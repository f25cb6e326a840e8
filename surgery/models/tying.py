"""The configuration of a merged model: labels of the adapter's head, its class, and weights that are no longer tied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from surgery.adapters.adapter import Adapter
from surgery.errors import CheckpointError, listing
from surgery.models.base_model import BaseModel
from surgery.models.heads import HEAD_TASKS
from surgery.storage.safetensors_read import read_json

__all__ = [
    "check_untied",
    "class_names",
    "raw_config",
    "tied_groups",
    "untied_config",
    "wants_untying",
    "with_class",
    "with_labels",
]


def raw_config(base: BaseModel) -> dict[str, Any]:
    """`config.json` of the base."""
    return read_json(base.folder / "config.json")


def with_labels(
    base: BaseModel, replaced: Mapping[str, torch.Tensor], names: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """The configuration with the labels that the adapter's own head has, or None where they are the base's.

    Args:
        base: the base model.
        replaced: what the adapter brings whole, by parameter of the model.
        names: of the classes, where they are known; they count where the head has as many.
    """
    if base.task is None or base.task.name not in HEAD_TASKS:
        return None
    other = {
        int(tensor.shape[0])
        for name, tensor in replaced.items()
        if tensor.ndim and tensor.shape[0] != base.shapes[name][0] == base.config.num_labels
    }
    if not other and names is not None and _brings_classes(base, replaced, len(names)):
        return _labelled(base, names)
    if len(other) != 1:
        return None
    count = other.pop()
    known = names is not None and len(names) == count
    return _labelled(base, names if names is not None and known else [f"LABEL_{index}" for index in range(count)])


def class_names(adapter: Adapter) -> list[str] | None:
    """The names of the classes of a head that was made with the adapter; None where they are numbers, or unknown."""
    labels = adapter.provenance.get("labels")
    if not isinstance(labels, list) or all(isinstance(label, int) for label in labels):
        return None
    names = [str(label) for label in labels]
    return names if len(set(names)) == len(names) else None


def _brings_classes(base: BaseModel, replaced: Mapping[str, torch.Tensor], count: int) -> bool:
    """Whether a head of as many classes as the base has, and as are named, is among what is brought."""
    body = f"{base.model.base_model_prefix}."
    heads = [tensor for name, tensor in replaced.items() if not name.startswith(body)]
    return base.config.num_labels == count and any(head.ndim and head.shape[0] == count for head in heads)


def _labelled(base: BaseModel, names: Sequence[str]) -> dict[str, Any]:
    config = raw_config(base)
    config.pop("num_labels", None)
    config["id2label"] = {str(index): name for index, name in enumerate(names)}
    config["label2id"] = {name: index for index, name in enumerate(names)}
    return config


def with_class(base: BaseModel, config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The configuration naming the class that the adapter is for, or as it was given where it does."""
    name = type(base.model).__name__
    current = config if config is not None else raw_config(base)
    if (current.get("architectures") or [None])[0] == name or base.task is None:
        return config
    return {**current, "architectures": [name]}


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
