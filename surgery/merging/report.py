"""The figures that a merge returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["MergeReport", "MergedSite"]


@dataclass
class MergedSite:
    """One layer that an adapter has changed.

    Attributes:
        module: its name in the model.
        shape: `(out_features, in_features)`.
        change: Frobenius norm of the change over that of the base weight; None for a base weight of zeros.
        rounding: norm of what rounding to the stored dtype took away, over that of the change; None for no change.
    """

    module: str
    shape: tuple[int, int]
    change: float | None
    rounding: float | None


@dataclass
class MergeReport:
    """The result of `surgery.merge`, with the keys of its `--json` output.

    Attributes:
        out: the folder written, or None for a dry run.
        peft_type: PEFT type of the adapter.
        modules: number of layers whose weights changed.
        parameters: numbers in the result's files.
        bytes: size of its safetensors files; of their tensors for a dry run.
        seconds: time from opening the inputs to the verified output.
        base: what the base model was called.
        model_class: the transformers class of the result.
        device: device the changes were computed on.
        dtypes: bytes by dtype in the result.
        files: its safetensors files.
        replaced: parameters that the adapter brings whole.
        added: parameters that the base's files lack.
        left_out: files of the base's folder that were not copied.
        dry_run: nothing was computed and written.
        trainable_parameters: always 0: what the adapter trained is part of the weights.
        notes: what the user should know.
        sites: one entry for each changed layer; none for a dry run.
        command: the command.
    """

    out: str | None
    peft_type: str
    modules: int
    parameters: int
    bytes: int
    seconds: float
    base: str
    model_class: str
    device: str
    dtypes: dict[str, int]
    files: list[str]
    replaced: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    dry_run: bool = False
    trainable_parameters: int = 0
    notes: list[str] = field(default_factory=list)
    sites: list[MergedSite] = field(default_factory=list)
    command: str = "merge"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)
