"""The import contract: imports point one way, and there are no circles between files or packages.

Read from the syntax trees, so that imports inside functions and for type checkers count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["LAYERS", "circles", "import_graph", "problems"]

# From the lowest to the highest. A package imports from those before its own entry; those that share an entry do not
# import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "version"),
    ("system",),
    ("storage",),
    ("linalg",),
    ("deltas",),
    ("codec",),
    ("models",),
    ("methods",),
    ("adapters.types",),
    ("adapters",),
    ("formats",),
    ("passes",),
    ("peft_types",),
    ("display",),
    ("initialization", "comparison", "inspection", "merging"),
    ("publishing",),
    ("training",),
    ("converters",),
    ("blending",),
    ("exporting",),
    ("serving",),
    ("cli",),
    ("",),  # surgery/__init__.py and __main__.py
)


def import_graph(root: Path) -> dict[str, dict[str, int]]:
    """Return every module below `root/surgery` with the modules that it imports, each with the line of the import."""
    paths = {_module_name(path.relative_to(root)): path for path in _sources(root / "surgery")}
    return {name: dict(_imported(path, paths)) for name, path in paths.items()}


def problems(graph: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line for each import that runs upward or sideways, and for each circle of files or packages."""
    ranks = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}
    found = []
    edges: dict[str, set[str]] = {}
    for importer, imported in graph.items():
        if package_of(importer) not in ranks:
            found.append(f"{importer}: {package_of(importer)} is in no layer; add it to tests/lint/imports.py")
            continue
        for other, line in imported.items():
            mine, theirs = package_of(importer), package_of(other)
            edges.setdefault(mine, set())
            if mine == theirs:
                continue
            edges[mine].add(theirs)
            if ranks[theirs] >= ranks[mine]:
                found.append(f"{importer}, line {line}: imports {other}, which is not below {mine or 'surgery'}")
    found += [f"circle of packages: {' - '.join(circle)}" for circle in circles(edges)]
    return found + [f"circle of files: {' - '.join(circle)}" for circle in circles(graph)]


def circles(graph: Mapping[str, Mapping[str, int] | set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other, each sorted."""
    reach = {node: _reachable(graph, node) for node in graph}
    groups = {tuple(sorted(other for other in reach[node] if node in reach.get(other, ()))) for node in graph}
    return [list(group) for group in sorted(groups) if group]


def package_of(module: str) -> str:
    """Return the entry of `LAYERS` that a module belongs to."""
    parts = module.split(".")[1:]
    named = {package for packages in LAYERS for package in packages}
    return next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in named), parts[0] if parts else "")


def _reachable(graph: Mapping[str, Mapping[str, int] | set[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = list(graph[start])
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += graph.get(node, ())
    return found


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):  # rglob does not follow the link surgery/converters
        if path.is_dir():
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _module_name(path: Path) -> str:
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    return "surgery" if name == "surgery.__main__" else name


def _imported(path: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known:
                    yield whole, node.lineno
                elif node.module in known:
                    yield node.module, node.lineno
