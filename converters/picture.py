"""Pictures of conversions: size against error, a point for each adapter of a batch, or for each layer of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.converters.report import BatchReport, ConvertReport
from surgery.display.scatter import Point, draw_points

__all__ = ["draw_batch", "draw_layers"]


def draw_batch(batch: BatchReport, path: Path) -> None:
    """Draw the adapters of a batch that were converted.

    The error is that of the predictions (KL), where all have it, otherwise that of the weights.

    Raises:
        OutputError: the picture cannot be written.
    """
    found = [(entry.adapter, entry.report) for entry in batch.entries if entry.report is not None]
    axis = _axis([report for _, report in found])
    points = [Point(name, report.bytes / 1024, axis.value(report), report.source_type) for name, report in found]
    failed = f", {len(batch.failed)} failed" if batch.failed else ""
    draw_points(points, f"{len(points)} adapters as {batch.to}{failed}", ("size (KiB)", axis.label), path)


def draw_layers(report: ConvertReport, path: Path) -> None:
    """Draw the layers of one conversion.

    Raises:
        OutputError: the picture cannot be written.
    """
    points = [
        Point(site.module, site.bytes / 1024, site.weight_error, site.module.rpartition(".")[2])
        for site in report.sites
    ]
    draw_points(points, f"{report.source} as {report.to}, by layer", ("size (KiB)", "weight error"), path)


@dataclass(frozen=True)
class _Axis:
    label: str
    value: Callable[[ConvertReport], float]


def _axis(reports: Sequence[ConvertReport]) -> _Axis:
    if reports and all(report.kl is not None for report in reports):
        return _Axis("KL divergence of the predictions (nats)", lambda report: report.kl or 0.0)
    return _Axis("weight error", lambda report: report.weight_error)
