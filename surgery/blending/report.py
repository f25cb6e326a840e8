"""The figures that a blend returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from surgery.converters.report import ConvertReport

__all__ = ["BlendReport", "BlendedMember"]


@dataclass
class BlendedMember:
    """One member of a blend.

    Attributes:
        adapter: its name.
        peft_type: its PEFT type.
        weight: what its changes were multiplied by.
        modules: layers that it changes.
        remains: how much of it is in the result: the inner product of the result's changes with its own, over its own
            squared norm, over all layers together. Its weight, where the members have nothing in common.
        cosine: of the result's changes with its own.
    """

    adapter: str
    peft_type: str
    weight: float
    modules: int
    remains: float
    cosine: float


@dataclass
class BlendReport:
    """The result of `surgery.blend`, with the keys of its `--json` output.

    Attributes:
        how: the combination.
        density: the share of the entries of each member that was kept; None where none are dropped.
        members: one entry for each.
        head: the member whose saved modules (heads, biases, embeddings) are in the result; None where there are none.
        converted: what bringing the combined changes into the result's form and budget lost, as `surgery.convert`
            reports it; its source is the exact blend.
        notes: what the user should know.
        command: the command.
    """

    how: str
    density: float | None
    members: list[BlendedMember]
    head: str | None
    converted: ConvertReport
    notes: list[str] = field(default_factory=list)
    command: str = "blend"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)
