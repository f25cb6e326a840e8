"""One file appears whole or not at all, and what the system refuses is a named error."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from surgery.errors import OutputError
from surgery.storage.atomic_file import atomic_file


def test_it_takes_its_name_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "curve.png"
    target.write_text("before")
    with atomic_file(target) as partial:
        assert partial.suffix == ".png" and partial != target
        partial.write_text("after")
        assert target.read_text() == "before"
    assert target.read_text() == "after"
    assert {path.name for path in tmp_path.iterdir()} == {"curve.png"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "No space left")])
def test_an_error_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "curve.png"
    target.write_text("before")
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught, atomic_file(target) as partial:
        partial.write_text("half")
        raise error
    if expected is OutputError:
        assert str(caught.value) == f"{target}: cannot be written (No space left); nothing was changed"
    assert target.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"curve.png"}


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    target = tmp_path / "curve.png"
    with atomic_file(target) as partial:
        partial.write_text("first")
        with pytest.raises(OutputError, match="another run is writing it"), atomic_file(target):
            pass
    assert target.read_text() == "first"
