"""A model's labels: its configuration with those of an adapter's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from surgery.models.base_model import BaseModel
from surgery.models.heads import HEAD_TASKS
from surgery.storage.json_files import read_json

__all__ = ["raw_config", "with_class", "with_labels"]


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
    if (current.get("architectures") or [None])[0] == name or base.task is None or base.is_text_part:
        return config
    return {**current, "architectures": [name]}
