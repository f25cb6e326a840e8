"""The figures that a run returns: for each adapted layer and overall."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Report", "SiteReport"]


@dataclass
class SiteReport:
    """One adapted layer.

    Attributes:
        module: its name.
        shape: `(out_features, in_features)`.
        rank: the adapter's rank there, or None for a method without one.
        parameters: numbers that train.
        bytes: bytes of its tensors in the adapter's file.
        captured: share of the weight's squared norm that the frozen start holds, where the method has one.
    """

    module: str
    shape: tuple[int, int]
    rank: int | None
    parameters: int
    bytes: int
    captured: float | None = None


@dataclass
class Report:
    """The result of a command, with the keys of its `--json` output.

    Attributes:
        command: the command.
        out: the folder written, or None for a dry run.
        method: the method, for `init`.
        peft_type: PEFT type of the adapter written.
        modules: number of adapted layers.
        trainable_parameters: numbers that train, carried heads included.
        bytes: size of `adapter_model.safetensors`; of its tensors for a dry run.
        seconds: time from opening the input to the verified output.
        base: what the base model was called.
        model_class: the transformers class that the adapter's module names are for.
        device: device the tensors were computed on.
        notes: what the user should know.
        loss: the mean loss on the data, for a start that comes from its gradient.
        samples: how many samples of a data file that was.
        labels: classes of a head that the data, not the checkpoint, determined.
        not_adapted: layers that can't be adapted, with the reason.
        sites: one entry for each adapted layer.
    """

    command: str
    out: str | None
    method: str
    peft_type: str
    modules: int
    trainable_parameters: int
    bytes: int
    seconds: float
    base: str
    model_class: str
    device: str
    dry_run: bool = False
    loss: float | None = None
    samples: int | None = None
    labels: int | None = None
    notes: list[str] = field(default_factory=list)
    not_adapted: dict[str, str] = field(default_factory=dict)
    sites: list[SiteReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)
