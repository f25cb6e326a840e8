"""A data file with the settings by which samples are drawn from it, as one argument of the library's calls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery.errors import OptionError

__all__ = ["DataSettings"]


@dataclass(frozen=True)
class DataSettings:
    """A data file and how it is read: given as `data=` in place of the keywords of the same names.

    None leaves a setting at the default of the call that reads the data.

    Attributes:
        data: the file: `.jsonl`, `.txt`, `.csv`, `.parquet`; for images also a folder.
        samples: how many samples are drawn from it.
        batch_size: samples run at a time.
        max_length: tokens of the longest sample.
        chat_template: a file with the chat template for messages, in place of the tokenizer's.
        stats: convert: a file of calibration statistics.
    """

    data: str | Path
    samples: int | None = None
    batch_size: int | None = None
    max_length: int | None = None
    chat_template: str | Path | None = None
    stats: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}")
