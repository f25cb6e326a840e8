"""Pictures: heat maps of layers by roles. matplotlib is imported where it is used; no global state of it is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from surgery.errors import OptionError, OutputError
from surgery.storage.atomic_file import atomic_file
from surgery.system.extras import extra_package

__all__ = ["Grid", "check_picture", "draw_grids", "short_number", "short_roles"]

ENDINGS = (".png", ".svg", ".pdf")
# Readable with every kind of colour vision, and in grey.
COLOURS = "cividis"
OUTSIDE = "outside"
MOST_NUMBERS = 400


class Placed(Protocol):
    """A layer with its place in the model."""

    @property
    def role(self) -> str: ...

    @property
    def layer(self) -> int | None: ...


P = TypeVar("P", bound=Placed)


@dataclass(frozen=True)
class Grid:
    """One heat map.

    Attributes:
        title: what the numbers are.
        values: rows by columns; None where there is no layer.
        text: how a number is written into its cell.
        limits: the smallest and largest number of the colour scale; None takes them from the values.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    text: Callable[[float], str]
    limits: tuple[float, float] | None = None


def check_picture(path: Path) -> None:
    """Check that a picture may be written there.

    Raises:
        MethodError: its name has an ending that is not a picture's.
        OutputError: there is a folder of that name, none to hold it, or one that may not be written.
    """
    extra_package("matplotlib.figure", f"{path}: a picture", OptionError)
    if path.suffix.lower() not in ENDINGS:
        raise OptionError(f"{path}: a picture's name ends with {', '.join(ENDINGS)}")
    try:
        is_folder, has_folder = path.is_dir(), path.absolute().parent.is_dir()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
    if is_folder or not has_folder:
        raise OutputError(f"{path}: {'is a folder' if is_folder else 'its folder does not exist'}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(f"{path}: its folder may not be written")


def draw_grids(grids: Sequence[Grid], rows: Sequence[str], columns: Sequence[str], title: str, path: Path) -> None:
    """Draw heat maps side by side, with layers from top to bottom and roles from left to right.

    Args:
        grids: the maps, all of the same rows and columns.
        rows: names of the layers.
        columns: names of the roles.
        title: of the picture.
        path: the file; the picture appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    extra_package("matplotlib.figure", f"{path}: a picture", OptionError)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers = len(rows) * len(columns) <= MOST_NUMBERS
    width = max(3.2, (0.62 if numbers else 0.3) * len(columns) + 2.2)
    height = min(max(2.4, (0.27 if numbers else 0.1) * len(rows) + 1.0), 12.0)
    figure = Figure(figsize=(width * len(grids), height + 1.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axes, grid in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids, strict=True):
        _draw(figure, axes, grid, rows, columns, numbers)
    _save(figure, path)


def short_number(number: float) -> str:
    """A number short enough for a cell: `0.012`, `4.5`, `110`; powers of ten for what is smaller or far larger."""
    return f"{number:.0f}" if 99.5 <= abs(number) < 1e5 else f"{number:.2g}"


def short_roles(roles: Sequence[str]) -> list[str]:
    """Names of roles as short as they stay distinct: without the path to the blocks, where all share it."""
    inside = {role: role.partition(".*.")[2] or role for role in roles}
    if len(set(inside.values())) == len(roles):
        return [inside[role] for role in roles]
    return [f"{role.partition('.')[0]}: {inside[role]}" if ".*." in role else role for role in roles]


def _places(sites: Sequence[Placed]) -> tuple[list[str], list[str]]:
    """Rows and columns of a heat map: the layers from first to last, what is outside of them, and the roles."""
    layers = sorted({site.layer for site in sites if site.layer is not None})
    outside = [OUTSIDE] if any(site.layer is None for site in sites) else []
    return [*map(str, layers), *outside], list(dict.fromkeys(site.role for site in sites))


def _grid(
    title: str,
    sites: Sequence[P],
    rows: Sequence[str],
    roles: Sequence[str],
    value: Callable[[P], float | None],
    text: Callable[[float], str],
) -> Grid:
    cells = {(OUTSIDE if site.layer is None else str(site.layer), site.role): value(site) for site in sites}
    return Grid(title, [[cells.get((row, role)) for role in roles] for row in rows], text)


def _draw(figure: Any, axes: Any, grid: Grid, rows: Sequence[str], columns: Sequence[str], numbers: bool) -> None:
    import matplotlib
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    values = np.array([[np.nan if v is None else v for v in row] for row in grid.values], dtype=float)
    colours = matplotlib.colormaps[COLOURS].with_extremes(bad="0.92")
    low, high = grid.limits or (min(0.0, float(np.nanmin(values))), float(np.nanmax(values)))
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high if high > low else low + 1)
    whole = all(number is None or float(number).is_integer() for row in grid.values for number in row)
    ticks = MaxNLocator(integer=True) if whole else None
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, ticks=ticks)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(grid.title, fontsize=8)
    axes.set_title(grid.title, fontsize=9)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    step = 1 if numbers else -(-len(rows) // 20)
    # Every so many blocks, and what is outside of them, which comes last.
    shown = [place for place in range(len(rows)) if place % step == 0 or rows[place] == OUTSIDE]
    axes.set_yticks(shown, [rows[place] for place in shown], fontsize=8)
    axes.set_ylabel("layer", fontsize=9)
    axes.tick_params(length=0)
    if not numbers:
        return
    middle = (low + high) / 2
    for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
        number = float(values[row, column])
        colour = "black" if number > middle else "white"
        axes.text(column, row, grid.text(number), ha="center", va="center", fontsize=6.5, color=colour)


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower())
