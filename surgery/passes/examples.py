"""From a data file to batches: samples drawn, made ready, and put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from surgery.errors import DataError
from surgery.models.base_model import BaseModel
from surgery.passes.chats import read_template
from surgery.passes.data_files import read_rows
from surgery.passes.encoders import IGNORED, Classes, Features, Images, encoder_for, is_number, vocabulary_size

__all__ = ["IGNORED", "Examples", "Features", "batches", "collated", "labels_in", "read_examples"]


@dataclass
class Examples:
    """Samples made ready for a model.

    Attributes:
        features: one dictionary of tensors for each sample.
        counts: over how many items (tokens, or 1) each sample's loss is summed.
        padding: by name, what fills a batch up; names that are not here are stacked.
        notes: what the user should know about them.
    """

    features: list[Features]
    counts: list[int]
    padding: Mapping[str, int]
    notes: list[str] = field(default_factory=list)

    @property
    def padded(self) -> list[str]:
        """Names of what is filled up."""
        return [name for name in self.features[0] if name in self.padding]

    @property
    def total(self) -> int:
        """Items of all samples."""
        return sum(self.counts)


def batches(examples: Examples, size: int, rank: int = 0, processes: int = 1) -> Iterator[dict[str, Any]]:
    """Batches of `size` samples, of which this process gets its share.

    Each has the key `share` besides the model's arguments: the batch's part of all items, by which its mean loss is
    to be weighted so that the losses sum to the mean over all items. A process for which a batch has no sample gets
    one of share 0: every process has the same number of batches.
    """
    order = range(len(examples.features))
    for start in range(0, len(order), size):
        whole = order[start : start + size]
        mine = whole[rank::processes]
        count = sum(examples.counts[index] for index in mine)
        # As long as the whole batch in every process: what is computed, and how, depends on the number of tokens.
        longest = {name: max(len(examples.features[i][name]) for i in whole) for name in examples.padded}
        chosen = [examples.features[index] for index in mine or whole[:1]]
        yield {**_collated(chosen, examples.padding, longest), "share": count / examples.total}


def collated(features: Sequence[Features], padding: Mapping[str, int]) -> Features:
    """Samples as one batch, filled up to the longest of them."""
    longest = {name: max(len(each[name]) for each in features) for name in features[0] if name in padding}
    return _collated(features, padding, longest)


def read_examples(
    path: str | Path,
    base: BaseModel,
    samples: int | None,
    max_length: int | None = None,
    seed: int = 0,
    labelled: bool = True,
    chat_template: str | Path | None = None,
) -> Examples:
    """Draw samples from a file and make them ready for a model.

    Conversations (`messages`, or `prompt` and `completion` as lists of messages) are written with the tokenizer's chat
    template; the loss of a language model is then on the assistant's turns alone.

    Args:
        path: a `.jsonl`, `.json`, `.txt`, `.csv` or `.parquet` file; for images also a folder of folders, one for
            each class.
        base: the model, which brings tokenizer or image processor and whose task says how rows are read.
        samples: how many, drawn at random; all where the file has fewer; None takes all, in the file's order.
        max_length: tokens of the longest sample, which is cut there.
        seed: of the drawing, and of the masks of masked language modelling.
        labelled: whether a loss is wanted. If not, classes need no labels (those that are there are kept), and a bare
            model takes texts.
        chat_template: a file with the chat template to use in place of the tokenizer's.

    Raises:
        DataError: the file cannot be used for this task.
    """
    encoder = encoder_for(base, max_length, seed, labelled)
    if chat_template is not None:
        encoder.use_template(read_template(chat_template))
    rows = read_rows(Path(path), wants_images=isinstance(encoder, Images))
    encoder.check(rows.columns, str(path))
    encoder.see_all(rows, str(path))
    features, counts, total = [], [], 0
    for index, row in enumerate(rows.drawn(samples, seed)):
        total += 1
        made = encoder.encode(row, index, str(path))
        count = encoder.count(made)
        if count:
            features.append(made)
            counts.append(count)
    empty = total - len(features)
    if not features:
        raise DataError(f"{path}: none of {total} samples has anything to learn from")
    _check_tokens(features, base)
    notes = encoder.notes(total)
    if samples is not None and len(rows) < samples:
        notes.append(f"the data has {len(rows)} samples, {samples} were asked for: all of them are used")
    if empty:
        notes.append(f"{empty} samples have no token to learn from and are left out")
    return Examples(features, counts, encoder.padding, notes)


def _check_tokens(features: Sequence[Features], base: BaseModel) -> None:
    """Check that the model has a row for every token: a GPU would end the program with an assertion."""
    if "input_ids" not in features[0]:
        return
    size = vocabulary_size(base)
    largest = max(int(each["input_ids"].max()) for each in features)
    if largest >= size:
        raise DataError(
            f"{base.folder}: its tokenizer gives the token {largest}, the model has {size:.0f}: it is of another model"
        )


def labels_in(path: str | Path, base: BaseModel) -> list[int | str]:
    """Return the different labels of a classification file, in order.

    Raises:
        DataError: the file cannot be read or has no column `label`.
    """
    images = base.task is not None and base.task.name == "image-cls"
    rows = read_rows(Path(path), wants_images=images)
    Classes.check_label(rows.columns, str(path))
    names = rows.label_names
    if names is not None:
        return [int(name) for name in names] if all(map(is_number, names)) else list(names)
    return sorted({value for value in rows.labels() if value is not None}, key=lambda v: (isinstance(v, str), v))


def _collated(features: Sequence[Features], padding: Mapping[str, int], longest: Mapping[str, int]) -> Features:
    def filled(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return F.pad(tensor, (0, longest[name] - len(tensor)), value=padding[name]) if name in longest else tensor

    return {name: torch.stack([filled(name, each[name]) for each in features]) for name in features[0]}
