"""Draw the packages and the one way in which they import each other, from the imports, into docs/architecture.svg."""

from __future__ import annotations

from pathlib import Path

from tests.lint.imports import LAYERS, import_graph, package_of

ROOT = Path(__file__).resolve().parents[1]
WIDTH, ROW, BOX, MARGIN = 880, 58, (124, 32), 24


def drawing() -> str:
    """Return the picture as SVG: a row for each layer, an arrow for each import that no other path implies."""
    edges = _package_edges()
    rows = [[package for package in layer if package in edges] for layer in reversed(LAYERS)]
    rows = [row for row in rows if row]
    places = {
        package: (WIDTH * (column + 1) / (len(row) + 1), MARGIN + BOX[1] / 2 + ROW * index)
        for index, row in enumerate(rows)
        for column, package in enumerate(row)
    }
    height = int(2 * MARGIN + BOX[1] + ROW * (len(rows) - 1))
    lines = [_arrow(places[a], places[b]) for a in edges for b in sorted(_needed(edges, a))]
    boxes = [_box(package or "surgery", *places[package]) for package in places]
    label = "Packages of surgery in layers; every arrow is an import, and all of them point down."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="13" role="img" '
            f'font-family="system-ui, sans-serif" aria-label="{label}">',
            f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#ffffff"/>',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" fill="#90a4ae"/></marker></defs>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


def _package_edges() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for importer, imported in import_graph(ROOT).items():
        mine = package_of(importer)
        edges.setdefault(mine, set()).update(package_of(other) for other in imported)
        edges[mine].discard(mine)
    for low in LAYERS[0]:  # errors and the version, which everybody imports
        edges.pop(low, None)
        for targets in edges.values():
            targets.discard(low)
    return edges


def _needed(edges: dict[str, set[str]], package: str) -> set[str]:
    """Return the imports of a package that do not follow from its other imports."""

    def below(start: str) -> set[str]:
        return edges[start].union(*(below(other) for other in edges[start]))

    implied = set().union(*(below(other) for other in edges[package])) if edges[package] else set()
    return edges[package] - implied


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    top, bottom = y1 + BOX[1] / 2, y2 - BOX[1] / 2 - 2
    middle = (top + bottom) / 2
    path = f"M{x1:.0f} {top:.0f} C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {bottom:.0f}"
    return f'<path d="{path}" fill="none" stroke="#90a4ae" stroke-width="1.3" marker-end="url(#tip)"/>'


def _box(name: str, x: float, y: float) -> str:
    left, top = x - BOX[0] / 2, y - BOX[1] / 2
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="6" fill="#e3f2fd" '
        'stroke="#37474f"/>'
        f'<text x="{x:.0f}" y="{y + 4.5:.0f}" text-anchor="middle" fill="#1c2a30">{name}</text>'
    )
