"""Plain-text tables for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

__all__ = ["summary", "table"]


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (), width: int | None = None
) -> str:
    """Columns aligned by spaces; where they would be wider than the terminal, a paragraph for each row.

    Args:
        header: column titles.
        rows: cells.
        right: indices of the columns that are aligned to the right.
        width: of the terminal; None where lines may have any length.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        return "\n".join(_paragraph(header, row, width) for row in rows)

    def line(cells: Sequence[str]) -> str:
        parts = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def _paragraph(header: Sequence[str], row: Sequence[str], width: int) -> str:
    """A row of a table: its first cell, and below it the others, each behind its title and never broken in itself."""
    unbroken = (f"{title} {cell}".replace(" ", "\0") for title, cell in zip(header[1:], row[1:], strict=True))
    text = textwrap.fill(
        "; ".join(unbroken), width, initial_indent="  ", subsequent_indent="  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return f"{row[0]}\n{text}".replace("\0", " ").rstrip()


def summary(pairs: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Labels and values, one pair a line; a value that is wider than the terminal goes on below itself."""
    labels = max(len(label) for label, _ in pairs) + 2

    def line(label: str, value: str) -> str:
        text = f"{label.ljust(labels)}{value}"
        if width is None or len(text) <= width or width < 2 * labels:
            return text
        return textwrap.fill(
            text, width, subsequent_indent=" " * labels, break_long_words=False, break_on_hyphens=False
        )

    return "\n".join(line(label, value) for label, value in pairs)
