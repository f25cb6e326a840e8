"""The reports that a conversion of one adapter, and one of many, return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.adapters.adapter import Adapter

__all__ = ["BatchEntry", "BatchReport", "ConvertReport", "ConvertedSite"]


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
        gains: what the result's gains on the base weight are on, `rows`, `outputs` or `inputs`; None where it has none.
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
    gains: str | None = None


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
        ratio: bytes of the old factors over those of the new ones: of the files, less the tensors saved whole.
        saved_bytes: of the new file, for tensors that are saved whole (heads, biases, embeddings) and kept as they are.
        saved_modules: the modules that these belong to.
        source_bytes_bf16: size of the old file if its factors were bfloat16; None where they are no wider than that.
        gain_bytes: of the new file, for gains on rows or columns of the base weight (of DoRA and IA3).
        padding_bytes: of the new file, for zeros that bring all layers of a LoRA to one rank.
        kept: share of the adapter that is kept. With data `1 - KL(source, result) / KL(source, base)` (of a bare
            encoder the cosine loss, of a regression the squared error in place of KL), otherwise `1 - weight_error^2`.
        weight_error: root of the summed squared differences over all layers, over the same of the source.
        output_error: the same in the layers' outputs on the calibration data, or None without data.
        agreement: share of predictions that the result shares with the source, on held-out samples of the data.
        kl: mean KL divergence of the result's predictions from the source's, in nats for each item.
        cosine: mean cosine similarity of the embeddings, for a model without a head.
        squared_error: mean squared difference of the outputs, for a model whose output is numbers.
        perplexity: of the result on the held-out samples, for a language model.
        source_perplexity: of the source on the same.
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
    kept: float = 1.0
    saved_bytes: int = 0
    saved_modules: list[str] = field(default_factory=list)
    source_bytes_bf16: int | None = None
    padding_bytes: int = 0
    gain_bytes: int = 0
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    squared_error: float | None = None
    perplexity: float | None = None
    source_perplexity: float | None = None
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


@dataclass
class BatchEntry:
    """One adapter of a batch.

    Attributes:
        adapter: its name in the batch.
        state: `done`, `skipped` (finished by an earlier run) or `failed`.
        kind: PEFT type of the source, or None where it could not be read.
        out: the folder that holds the result, or None.
        error: why it failed, or None.
        report: the report of the conversion; of one that was skipped, as the earlier run wrote it, without `sites`.
        seconds: time that it took.
        made: the result, where no folder holds it.
    """

    adapter: str
    state: Literal["done", "skipped", "failed"]
    kind: str | None = None
    out: str | None = None
    error: str | None = None
    report: ConvertReport | None = None
    seconds: float = 0.0
    made: Adapter | None = field(default=None, repr=False)

    def open(self) -> Adapter:
        """Return the converted adapter, read from its folder where there is one.

        Raises:
            SurgeryError: the conversion failed.
        """
        if self.made is not None:
            return self.made
        if self.report is None or self.out is None:
            raise SurgeryError(f"{self.adapter}: {self.error or 'nothing was written'}")
        from surgery.adapters.adapter import Adapter

        return Adapter.open(self.out)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain values, ready for JSON: the report's, or the error."""
        own = {"adapter": self.adapter, "state": self.state}
        if self.report is None:
            return {**own, "kind": self.kind, "error": self.error}
        return {**self.report.to_dict(), **own}


@dataclass
class BatchReport(Sequence["tuple[Adapter, ConvertReport]"]):
    """The result of `surgery.convert` for a list.

    As a sequence it has a pair of adapter and report for each member, in the order of the list; that of one which
    failed raises its error. `entries` holds all of them without raising.

    Attributes:
        out: the folder that holds the results, or None.
        to: the form asked for.
        entries: one for each adapter.
        seconds: time of the whole batch.
    """

    out: str | None
    to: str
    entries: list[BatchEntry]
    seconds: float = 0.0
    command: str = "convert"

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> tuple[Adapter, ConvertReport]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[Adapter, ConvertReport]]: ...

    def __getitem__(self, index: int | slice) -> tuple[Adapter, ConvertReport] | list[tuple[Adapter, ConvertReport]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        entry = self.entries[index]
        adapter = entry.open()
        assert entry.report is not None
        return adapter, entry.report

    @property
    def failed(self) -> list[BatchEntry]:
        """The entries that failed."""
        return [entry for entry in self.entries if entry.state == "failed"]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        reports = [entry.report for entry in self.entries if entry.report is not None]
        return {
            "command": self.command,
            "out": self.out,
            "to": self.to,
            "bytes": sum(report.bytes for report in reports),
            "source_bytes": sum(report.source_bytes for report in reports),
            "failed": len(self.failed),
            "seconds": self.seconds,
            "adapters": [entry.to_dict() for entry in self.entries],
        }
