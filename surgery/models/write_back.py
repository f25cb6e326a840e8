"""From the parameters of a model back to the tensors of its checkpoint.

transformers' conversion rules split, join and permute tensors while loading. Such a rule moves numbers and computes
nothing, so it is inverted by sending through it, in place of the numbers, where each of them is from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from surgery.errors import CheckpointError
from surgery.models.checkpoint_names import Source

__all__ = ["written_back"]

Read = Callable[[str], torch.Tensor]


def written_back(source: Source, model: Any, read: Read, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under which some of its parameters have new values, all others their old ones.

    Args:
        source: where the parameters come from, by one rule.
        model: the model that they belong to.
        read: reads a tensor of the checkpoint.
        values: the new values by parameter, in the model's orientation and the checkpoint's dtype.

    Returns:
        Every tensor of the source by its name in the checkpoint.

    Raises:
        CheckpointError: the rule is not a rearrangement, so that no exact inverse is known.
    """
    old = {key: read(key) for key, _ in source.keys}
    places, start = {}, 0
    for key, tensor in old.items():
        places[key] = torch.arange(start, start + tensor.numel()).reshape(tensor.shape)
        start += tensor.numel()
    flat = torch.cat([tensor.reshape(-1) for tensor in old.values()])
    for parameter, value in values.items():
        try:
            origins = source.read(parameter, model, lambda key: places[key])
        except Exception as error:  # a rule of transformers that takes floating-point numbers only, say
            raise CheckpointError(_irreversible(source, parameter, type(error).__name__)) from None
        moved = origins.shape == value.shape and origins.dtype == torch.int64
        if not moved or int(origins.min()) < 0 or int(origins.max()) >= start:
            raise CheckpointError(_irreversible(source, parameter, "its rule changes shapes or numbers"))
        flat[origins.reshape(-1)] = value.reshape(-1).to(flat.dtype)
    parts = flat.split([tensor.numel() for tensor in old.values()])
    new = {key: part.reshape(tensor.shape).clone() for (key, tensor), part in zip(old.items(), parts, strict=True)}
    for parameter, value in values.items():
        if not torch.equal(source.read(parameter, model, lambda key: new[key].clone()), value):
            raise CheckpointError(_irreversible(source, parameter, "its rule does more than move numbers"))
    return new


def _irreversible(source: Source, parameter: str, reason: str) -> str:
    keys = ", ".join(key for key, _ in source.keys[:3])
    return f"{parameter}: cannot be written back into {keys} of the checkpoint ({reason})"
