"""The figures that a conversion returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ConvertReport", "ConvertedSite"]


@dataclass
class ConvertedSite:
    """One layer of the source.

    Attributes:
        module: its name.
        shape: `(out_features, in_features)`.
        source_rank: rank of the source's factors.
        rank: rank that is left; 0 for a layer that left the target list.
        bits: mean bits of a stored number, where numbers are codes.
        energy: squared norm of the source's change.
        weight_error: Frobenius norm of the difference over that of the source's change; 0 for a change of zero.
        output_error: the same for the layer's output on the calibration data, or None without data.
        bytes: of the layer's tensors in the new file; its share of the codes where these are in one piece.
        output_energy: mean squared norm of what the source adds to the layer's output on the data; 0 without data.
    """

    module: str
    shape: tuple[int, int]
    source_rank: int
    rank: int
    bits: float | None
    energy: float
    weight_error: float
    output_error: float | None
    bytes: int
    output_energy: float = 0.0


@dataclass
class ConvertReport:
    """The result of `surgery.convert`, with the keys of its `--json` output.

    Attributes:
        out: the folder written, or None where nothing was.
        to: the form asked for.
        peft_type: PEFT type of the result.
        source: the adapter's name.
        source_type: its PEFT type.
        modules: layers that have a change in the result.
        trainable_parameters: numbers in the result that a trainer would train, heads included.
        bytes: size of the new `adapter_model.safetensors`.
        source_bytes: size of the old one.
        ratio: the old size over the new one.
        weight_error: root of the summed squared differences over all layers, over the same of the source.
        output_error: the same in the layers' outputs on the calibration data, or None without data.
        agreement: share of predictions that the result shares with the source, on held-out samples of the data.
        kl: mean KL divergence of the result's predictions from the source's, in nats for each item.
        reload_difference: largest relative difference between a layer's change as reopened and as meant.
        seconds: time from opening the inputs to the verified output.
        base: what the base model was called, or None.
        device: where it was computed.
        dry_run: nothing was written.
        notes: what the user should know.
        sites: one entry for each layer of the source.
    """

    out: str | None
    to: str
    peft_type: str
    source: str
    source_type: str
    modules: int
    trainable_parameters: int
    bytes: int
    source_bytes: int
    ratio: float
    weight_error: float
    output_error: float | None = None
    agreement: float | None = None
    kl: float | None = None
    reload_difference: float | None = None
    seconds: float = 0.0
    base: str | None = None
    device: str = "cpu"
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)
    sites: list[ConvertedSite] = field(default_factory=list)
    command: str = "convert"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)
