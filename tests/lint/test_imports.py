"""The import contract fails where it must: upward, sideways, circles of files and of packages, unknown packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lint.imports import import_graph, problems

BROKEN = {
    "upward": ({"surgery/storage/a.py": "from surgery.adapters.b import x", "surgery/adapters/b.py": ""}, "not below"),
    "deferred": (
        {"surgery/storage/a.py": "def f():\n    from surgery.adapters.b import x", "surgery/adapters/b.py": ""},
        "line 2: imports surgery.adapters.b",
    ),
    "for the type checker": (
        {"surgery/storage/a.py": "if TYPE_CHECKING:\n    import surgery.adapters.b", "surgery/adapters/b.py": ""},
        "not below",
    ),
    "sideways": ({"surgery/merging/a.py": "import surgery.inspection.b", "surgery/inspection/b.py": ""}, "not below"),
    "files": (
        {"surgery/linalg/a.py": "from surgery.linalg import b", "surgery/linalg/b.py": "import surgery.linalg.a"},
        "circle of files: surgery.linalg.a - surgery.linalg.b",
    ),
    "packages": (
        {
            "surgery/linalg/a.py": "import surgery.codec.b",
            "surgery/codec/b.py": "",
            "surgery/codec/c.py": "import surgery.linalg.d",
            "surgery/linalg/d.py": "",
        },
        "circle of packages: codec - linalg",
    ),
    "unknown": ({"surgery/attic/a.py": ""}, "attic is in no layer"),
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"surgery/__init__.py": "", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_the_contract_is_named(name: str, tmp_path: Path) -> None:
    files, message = BROKEN[name]
    assert any(message in line for line in problems(import_graph(tree(tmp_path, files))))


def test_imports_that_point_down_are_none(tmp_path: Path) -> None:
    files = {"surgery/adapters/b.py": "import surgery.storage.a", "surgery/storage/a.py": "import surgery.errors"}
    assert problems(import_graph(tree(tmp_path, {**files, "surgery/errors.py": ""}))) == []


def test_the_house_keeps_it() -> None:
    assert problems(import_graph(Path(__file__).parents[2])) == []
