"""The results of an inspection."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["InspectedRole", "InspectedSite", "Inspection"]


@dataclass
class InspectedSite:
    """One linear layer of a model, or one that an adapter changes.

    Attributes:
        module: its name.
        role: the same with the block's index replaced by `*`.
        layer: the block's index, or None outside the blocks.
        shape: `(out_features, in_features)`; None for an adapter whose file does not say.
        dtype: of its tensors; several are joined by `+`.
        parameters: numbers in the file for it.
        bytes: their bytes.
        rank: the rank at which an adapter stores its change, where it has thin factors.
        norm: Frobenius norm of the change, or of the weight where spectra were asked for.
        energy: share of the layer in the sum of all squared norms.
        rank_95: how many singular values hold 95 % of the squared norm.
        rank_99: the same for 99 %.
        gains: what a packed adapter's gains on the base weight are on: `rows`, `outputs` or `inputs`; None for none.
    """

    module: str
    role: str
    layer: int | None
    shape: tuple[int, int] | None
    dtype: str
    parameters: int
    bytes: int
    rank: int | None = None
    norm: float | None = None
    energy: float | None = None
    rank_95: int | None = None
    rank_99: int | None = None
    gains: str | None = None


@dataclass
class InspectedRole:
    """The layers of one role, together; the fields are those of `InspectedSite`, in total or by their extremes."""

    role: str
    layers: int
    shapes: list[tuple[int, int]]
    dtypes: list[str]
    parameters: int
    bytes: int
    ranks: list[int]
    energy: float | None = None
    rank_95: tuple[int, int] | None = None
    rank_99: tuple[int, int] | None = None


@dataclass
class Inspection:
    """The result of `surgery.inspect`, with the keys of its `--json` output.

    Attributes:
        path: what was inspected.
        kind: `model` or `adapter`.
        peft_type: an adapter's PEFT type.
        model_class: a model's transformers class.
        base: the base model that an adapter names.
        task: an adapter's task type.
        modules: number of linear layers, or of layers that an adapter changes.
        parameters: numbers in the safetensors files.
        bytes: size of the safetensors files.
        dtypes: bytes by dtype.
        files: number of safetensors files.
        carried: parameters that an adapter brings whole.
        not_adapted: a model's weights that do a linear layer's work and cannot be adapted, with the reason.
        roles: the layers by role.
        sites: the layers.
        notes: what the user should know.
        seconds: time that it took.
        out: the picture that was drawn, or None.
        command: the command.
    """

    path: str
    kind: str
    peft_type: str | None
    model_class: str | None
    base: str | None
    task: str | None
    modules: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    files: int
    carried: list[str] = field(default_factory=list)
    not_adapted: dict[str, str] = field(default_factory=dict)
    roles: list[InspectedRole] = field(default_factory=list)
    sites: list[InspectedSite] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    out: str | None = None
    command: str = "inspect"

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain values, ready for JSON."""
        return asdict(self)
