"""Single tokens that an adapter trains beside its layers (PEFT's `trainable_token_indices`).

The file holds, for an embedding, the new rows of these tokens whole: they replace the base's rows. Where a model ties
its output head to the embedding, PEFT gives both the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.types.tensor_checks import check_finite
from surgery.errors import AdapterError

if TYPE_CHECKING:
    from surgery.models.base_model import BaseModel

__all__ = ["ROWS", "TrainedTokens", "is_token_tensor", "token_tensors", "tokens_on_base", "with_rows"]

# Short name of the tensor of rows, below the embedding's name.
ROWS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class TrainedTokens:
    """The tokens of one embedding.

    Attributes:
        indices: the tokens, in the order of the rows.
        rows: their new rows `(tokens, dim)`.
    """

    indices: list[int]
    rows: torch.Tensor


def is_token_tensor(stem: str) -> bool:
    """Return whether a tensor's name, without the model's prefix, is that of trained rows."""
    return stem.endswith(f".{ROWS}")


def token_tensors(adapter: Adapter) -> dict[str, TrainedTokens]:
    """Return the trained tokens of an adapter, by the embedding's name.

    Raises:
        AdapterError: the rows are not those of the tokens that the configuration names.
    """
    found = {}
    for name, rows in adapter.tensors.items():
        stem = name.removeprefix(MODEL_PREFIX)
        if is_token_tensor(stem):
            module = stem.removesuffix(f".{ROWS}")
            indices = _indices(adapter, module)
            if rows.ndim != 2 or rows.shape[0] != len(indices):
                raise AdapterError(
                    f"{adapter.label}: {stem} has shape {tuple(rows.shape)}, adapter_config.json names {len(indices)} "
                    "tokens (trainable_token_indices); save the adapter again"
                )
            check_finite(stem, rows)
            found[module] = TrainedTokens(indices, rows)
    return found


def _indices(adapter: Adapter, module: str) -> list[int]:
    given = adapter.config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        own = [tokens for key, tokens in given.items() if module == key or module.endswith(f".{key}")]
        # The head of a model that ties it to the embedding has the embedding's tokens.
        given = own[0] if own else next(iter(given.values()), None)
    plain = isinstance(given, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in given)
    if not plain or len(set(given or ())) != len(given or ()):
        raise AdapterError(
            f"{adapter.label}: trains tokens of {module}, and adapter_config.json has no usable "
            f"trainable_token_indices ({given!r:.80})"
        )
    return list(given or ())


def tokens_on_base(adapter: Adapter, base: BaseModel) -> dict[str, TrainedTokens]:
    """Return the trained tokens by the base's parameter, of tied ones under each name.

    Raises:
        AdapterError: the base has no such embedding, or not these tokens; tied parameters have other rows each.
    """
    from surgery.models.tying import tied_groups

    found: dict[str, TrainedTokens] = {}
    for module, tokens in token_tensors(adapter).items():
        parameter = base.names.located(f"{module}.weight", base.shapes)
        if parameter is None:
            raise AdapterError(
                f"{adapter.label}: trains tokens of {module}, which {type(base.model).__name__} ({base.name}) does not "
                "have: it is for another base model"
            )
        height, *width = base.shapes[parameter]
        if tokens.indices and max(tokens.indices) >= height:
            raise AdapterError(
                f"{adapter.label}: trains token {max(tokens.indices)} of {module}, the base has {height}; where the "
                f"vocabulary has grown, resize_token_embeddings({max(tokens.indices) + 1}) or more on the base first, "
                "and save it"
            )
        if list(tokens.rows.shape[1:]) != width:
            raise AdapterError(
                f"{adapter.label}: trains rows of {tokens.rows.shape[1]} numbers of {module}, the base has {width}: it "
                "is for another base model"
            )
        group = next((group for group in tied_groups(base.model) if parameter in group), [parameter])
        for name in group:
            other = found.setdefault(name, tokens)
            if other.indices != tokens.indices or not torch.equal(other.rows, tokens.rows):
                raise AdapterError(
                    f"{adapter.label}: trains {parameter} and {name} apart, which are one tensor in the base: save the "
                    "base with tie_word_embeddings=False first"
                )
    return found


def with_rows(value: torch.Tensor, tokens: TrainedTokens) -> torch.Tensor:
    """Return a copy of an embedding with the rows of the trained tokens, in its own dtype."""
    made = value.clone()
    made[torch.tensor(tokens.indices, dtype=torch.long)] = tokens.rows.to(made.device, made.dtype)
    return made
