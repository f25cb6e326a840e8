"""Pictures of points: one number against another, with a legend of their kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.storage.atomic_file import atomic_file

__all__ = ["Point", "draw_points", "named_points"]

# Names are written beside the points of no more than so many.
MOST_NAMES = 24
MARKERS = "osD^vPX*<>"
# The room of a name, in shares of the picture; points that are nearer to each other get one name together.
NAME_WIDTH, NAME_HEIGHT = 0.15, 0.03


@dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
        name: written beside it where there are few.
        x: its place from left to right.
        y: its place from bottom to top.
        kind: its entry in the legend.
    """

    name: str
    x: float
    y: float
    kind: str


def named_points(points: Sequence[Point]) -> list[tuple[Point, str]]:
    """Return the points that a name is written beside, and the name; it counts those that lie under it."""
    width = NAME_WIDTH * _span([point.x for point in points])
    height = NAME_HEIGHT * _span([point.y for point in points])
    named: list[tuple[Point, int]] = []
    for point in points:
        for index, (other, more) in enumerate(named):
            if abs(point.x - other.x) <= width and abs(point.y - other.y) <= height:
                named[index] = other, more + 1
                break
        else:
            named.append((point, 0))
    return [(point, f"{point.name} and {more} more" if more else point.name) for point, more in named]


def _span(values: Sequence[float]) -> float:
    return max(values, default=0.0) - min(values, default=0.0)


def draw_points(points: Sequence[Point], title: str, labels: tuple[str, str], path: Path) -> None:
    """Draw points, those of each kind in their own colour and form.

    Args:
        points: the points.
        title: of the picture.
        labels: of the axes, x and y.
        path: the file; the picture appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(point.kind for point in points))
    for number, kind in enumerate(kinds):
        own = [point for point in points if point.kind == kind]
        marker = MARKERS[number % len(MARKERS)]
        xs, ys = [point.x for point in own], [point.y for point in own]
        axes.scatter(xs, ys, s=26, marker=marker, label=kind, alpha=0.85)
    if len(points) <= MOST_NAMES:
        right = max((point.x for point in points), default=0.0) - NAME_WIDTH * _span([point.x for point in points])
        for point, name in named_points(points):
            offset, side = ((-4, 3), "right") if point.x > right else ((4, 3), "left")
            axes.annotate(
                name,
                (point.x, point.y),
                xytext=offset,
                textcoords="offset points",
                fontsize=7,
                ha=side,
            )
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(labels[0], fontsize=9)
    axes.set_ylabel(labels[1], fontsize=9)
    axes.grid(alpha=0.3)
    if kinds:
        axes.legend(fontsize=8)
    with atomic_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower())
