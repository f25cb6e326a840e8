"""The mirror names modules without tests, and reasons that are out of date."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lint import mirror
from tests.lint.imports import LAYERS
from tests.quick import QUICK


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree of two modules, of which one has its test file, and the link to a third."""
    for name in ("surgery/linalg/one.py", "surgery/linalg/two.py", "converters/three.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "surgery/converters").symlink_to(tmp_path / "converters")
    for name in ("tests/linalg/test_one.py", "tests/converters/test_three.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


ONE, TWO = "surgery/linalg/one.py", "surgery/linalg/two.py"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, ["surgery/linalg/two.py: has no tests/linalg/test_two.py"]),
        ({TWO: ("tests/linalg", "x")}, []),
        ({TWO: ("tests/gone.py", "x")}, ["two.py: tests/gone.py is not there"]),
        (
            {TWO: ("tests", "x"), ONE: ("tests", "x"), "gone.py": ("tests", "x")},
            ["one.py: tests/linalg/test_one.py is there", "gone.py: is not there"],
        ),
    ],
)
def test_problems(table: dict, words: list[str], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "ELSEWHERE", table)
    found = mirror.problems(root)
    assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True))


def test_the_house_keeps_it() -> None:
    assert mirror.problems(Path(__file__).parents[2]) == []


def test_the_quick_part_touches_every_package() -> None:
    tests = Path(__file__).parents[1]
    packages = {name.replace(".", "/") for names in LAYERS for name in names} - {"", "errors", "version"}
    assert packages - set(QUICK) == set()
    for folder, names in QUICK.items():
        assert [name for name in names.split() if not (tests / folder / f"{name}.py").is_file()] == []
