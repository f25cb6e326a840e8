"""The figures that an export returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ExportReport", "ExportedSite"]


@dataclass
class ExportedSite:
    """One layer of an exported adapter.

    Attributes:
        module: its name in the model.
        name: its name in the written file.
        shape: `(out_features, in_features)`.
        source_rank: rank of the source's factors, before padding or cutting; of what was cut from a full change.
        weight_error: Frobenius norm of the difference between what the server computes and the source's change, over
            that of the source's change; 0 for a change of zero.
    """

    module: str
    name: str
    shape: tuple[int, int]
    source_rank: int
    weight_error: float


@dataclass
class ExportReport:
    """The result of `surgery.export`, with the keys of its `--json` output.

    Attributes:
        out: the folder written, or None for a dry run.
        to: the target's name.
        title: the tool that reads it.
        peft_type: PEFT type of the source.
        source: the adapter's name.
        modules: layers whose weights it changes.
        rank: the one rank of all layers.
        dtype: the type of the numbers in the file.
        trainable_parameters: numbers in the file.
        bytes: size of the written file of tensors; for a dry run of the tensors alone.
        source_bytes: size of the source's file.
        padding_bytes: bytes of zeros that bring all layers to one rank.
        exact: the server computes the source's change, but for rounding to `dtype`.
        weight_error: root of the summed squared differences over all layers, over the same of the source.
        seconds: time from opening the inputs to the verified output.
        base: what the base model was called, or None.
        settings: what the server must be started with.
        commands: the commands that serve the adapter.
        dry_run: nothing was written.
        notes: what the user should know.
        sites: one entry for each layer.
        command: the command.
    """

    out: str | None
    to: str
    title: str
    peft_type: str
    source: str
    modules: int
    rank: int
    dtype: str
    trainable_parameters: int
    bytes: int
    source_bytes: int
    padding_bytes: int
    exact: bool
    weight_error: float
    seconds: float = 0.0
    base: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)
    sites: list[ExportedSite] = field(default_factory=list)
    command: str = "export"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)
