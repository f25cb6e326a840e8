"""The registry of file formats, and their interface: recognise, read, write, and the tool's own rule for dW."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.errors import AdapterError, OutputError
from surgery.system.registry import Registry

if TYPE_CHECKING:
    from surgery.models.base_model import BaseModel

__all__ = ["FORMATS", "AdapterParts", "Format", "format_of"]


@dataclass
class AdapterParts:
    """What a format reads of an adapter, and writes.

    Attributes:
        config: the configuration, in PEFT's words.
        tensors: every tensor, under PEFT's names.
        weights: the file that the tensors were read from; None where there is none.
        provenance: `surgery.json`, or an empty dictionary.
        card: `README.md`, or None.
        notes: what the user should know about the reading.
        as_stored: whether PEFT opens the folder as this adapter: its format is PEFT's, its names are those of the file.
        companions: files that belong to it (tokenizer, chat templates, processors) and go where it goes: name -> path.
        base: the base model, where a format is to be written that needs to know it.
        dtype: the type of the numbers in a file that is to be written, by its name in that format; None for the
            tensors' own.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    weights: Path | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    card: str | None = None
    notes: list[str] = field(default_factory=list)
    as_stored: bool = False
    companions: Mapping[str, Path] = field(default_factory=dict)
    base: BaseModel | None = None
    dtype: str | None = None


class Format(ABC):
    """A file format of adapters.

    Attributes:
        title: the tool that writes it.
    """

    title: str

    @abstractmethod
    def recognises(self, folder: Path) -> bool:
        """Return whether a folder holds an adapter in this format, by its file names and configuration."""

    @abstractmethod
    def read(self, folder: Path) -> AdapterParts:
        """Read an adapter.

        Raises:
            AdapterError: a file is missing, broken, or holds what cannot be read exactly.
        """

    def write(self, parts: AdapterParts, folder: Path, label: str) -> int:
        """Write an adapter into a folder that is there.

        Args:
            parts: the adapter.
            folder: where to.
            label: the output's name in messages.

        Returns:
            Bytes of the file of tensors.

        Raises:
            AdapterError: the format cannot hold this adapter.
            OutputError: writing fails, or the format is only read.
        """
        raise OutputError(f"{label}: adapters in the format of {self.title} are read, not written")

    def changes(self, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each layer's name and its `dW (out, in)`, float32, by the rule of the tool that reads the files.

        Raises:
            AdapterError: the files are not such.
        """
        raise AdapterError(f"{folder}: how {self.title} computes a weight change is not known here")


FORMATS: Registry[Format] = Registry(
    "surgery.formats",
    "format",
    Format,
    {
        "peft": "surgery.formats.peft:PEFT",
        "sharded": "surgery.formats.sharded:SHARDED",
        "pickle": "surgery.formats.pickle:PICKLE",
        "mlx": "surgery.formats.mlx:MLX",
        "vllm": "surgery.formats.vllm:VLLM",
        "sglang": "surgery.formats.sglang:SGLANG",
        "llama.cpp": "surgery.formats.gguf:LLAMA_CPP",
        "ollama": "surgery.formats.ollama:OLLAMA",
        "diffusers": "surgery.formats.diffusion:DIFFUSERS",
        "kohya": "surgery.formats.diffusion:KOHYA",
    },
)


def format_of(folder: Path) -> Format:
    """Return the format of a folder: the first that recognises it, otherwise PEFT's, which says what is missing."""
    peft = FORMATS.get("peft")
    assert peft is not None
    return next((entry for entry in FORMATS if entry.recognises(folder)), peft)
