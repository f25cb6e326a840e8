"""What was measured, as rows: ours beside the reference, and the target where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.process import Measured
from surgery.display.tables import table

__all__ = ["Row", "markdown", "show"]

ABSENT = "-"


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        case: its name.
        ours: our figures: `seconds`, `bytes`, on a GPU `gpu_bytes`; any of them may be missing.
        reference: the reference's.
        target: what is claimed, in words.
        met: whether these figures bear the claim out; None where there is no claim, or nothing that can judge it.
        floor: seconds that bytes and operations alone take on this machine; None where that was not worked out.
    """

    case: str
    ours: Measured
    reference: Measured | None = None
    target: str = ""
    met: bool | None = None
    floor: float | None = None

    def ratio(self, figure: str) -> float | None:
        """The reference's figure over ours."""
        ours, theirs = self.ours.get(figure), (self.reference or {}).get(figure)
        return theirs / ours if ours and theirs and ours > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """The row for a JSON file."""
        return {
            **vars(self),
            "time_ratio": self.ratio("seconds"),
            "memory_ratio": self.ratio("bytes"),
            "gpu_memory_ratio": self.ratio("gpu_bytes"),
        }


def show(rows: Sequence[Row]) -> str:
    """The rows that cost something as a table; what a GPU holds has columns of its own where one was used."""
    header, cells = _cells(rows)
    return table(header, cells, right=range(1, len(header) - 1))


def markdown(rows: Sequence[Row]) -> list[str]:
    """The same as lines of Markdown; none where no row costs anything."""
    header, cells = _cells(rows)
    lines = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *cells]]
    return lines if cells else []


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    rows = [row for row in rows if {"seconds", "bytes"} & set(row.ours)]
    figures = [("seconds", "", "(s)", _seconds), ("bytes", "peak ", "(MB)", _megabytes)]
    if any("gpu_bytes" in row.ours for row in rows):
        figures.append(("gpu_bytes", "GPU ", "(MB)", _megabytes))
    header = ["case"]
    for _, kind, unit, _ in figures:
        header += [f"our {kind}{unit}" if kind else f"ours {unit}", f"reference {kind}{unit}", "ratio"]
    cells = []
    for row in rows:
        line = [row.case]
        for figure, _, _, form in figures:
            line += [_cell(row.ours, figure, form), _cell(row.reference, figure, form), _ratio(row.ratio(figure))]
        cells.append([*line, _floor(row), _target(row)])
    return [*header, "of the floor", "target"], cells


def _cell(measurement: Measured | None, figure: str, form: Callable[[float], str]) -> str:
    value = (measurement or {}).get(figure)
    return ABSENT if value is None else form(value)


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f}"


def _ratio(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:,.0f} x" if value >= 100 else f"{value:.2f} x"


def _floor(row: Row) -> str:
    seconds = row.ours.get("seconds")
    return ABSENT if not row.floor or seconds is None else f"{seconds / row.floor:.1f} x"


def _target(row: Row) -> str:
    if not row.target or row.met is None:
        return row.target or ABSENT
    return f"{row.target}: {'met' if row.met else 'MISSED'}"
