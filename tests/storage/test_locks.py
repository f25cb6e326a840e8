"""Locks by the system's own means and, where it has no flock, by lock files: one at a time, and nothing left behind."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import pytest

from surgery.errors import OutputError
from surgery.storage import locks
from surgery.storage.atomic_file import atomic_file
from surgery.storage.atomic_folder import atomic_folder
from surgery.storage.locks import exclusive_folder, exclusive_lock, hold, shared_lock, try_exclusive, try_exclusive_lock

SOURCES = Path(__file__).parents[2] / "surgery"
POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}


@pytest.fixture(params=["flock", "lock files"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "lock files":
        monkeypatch.setattr(locks, "fcntl", None)


@pytest.mark.usefixtures("system")
def test_one_writer_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "file").write_text("mine")
        with pytest.raises(OutputError, match="another run is writing it"), atomic_folder(out):
            pass
    assert (out / "file").read_text() == "mine"
    with atomic_folder(out, force=True) as folder:
        (folder / "file").write_text("new")
    assert (out / "file").read_text() == "new" and list(tmp_path.iterdir()) == [out]
    with atomic_file(tmp_path / "plot.png") as path:
        path.write_bytes(b"picture")
        with pytest.raises(OutputError, match="another run is writing it"), atomic_file(tmp_path / "plot.png"):
            pass
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "plot.png"]


@pytest.mark.usefixtures("system")
def test_what_is_gone_is_not_held(tmp_path: Path) -> None:
    with pytest.raises((BlockingIOError, FileNotFoundError)):
        hold(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
    held = hold(tmp_path)
    with pytest.raises(BlockingIOError):
        hold(tmp_path)
    held.release()
    hold(tmp_path).release()


@pytest.mark.usefixtures("system")
def test_threads_wait_for_each_other(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with exclusive_folder(tmp_path / "folder"), exclusive_lock(tmp_path / "lock"):
            order.append("second")

    (tmp_path / "folder").mkdir()
    with exclusive_lock(tmp_path / "lock"), try_exclusive_lock(tmp_path / "other") as mine:
        thread = threading.Thread(target=second)
        thread.start()
        assert mine
        found: list[bool] = []

        def ask() -> None:
            with try_exclusive_lock(tmp_path / "other") as theirs:
                found.append(theirs)

        asking = threading.Thread(target=ask)
        asking.start()
        asking.join()
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and found == [False]


def test_a_store_says_what_cannot_work_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(OutputError, match="which this system cannot lock"):
        shared_lock(tmp_path)
    assert try_exclusive(tmp_path) is None


def test_nothing_that_only_posix_has_is_imported() -> None:
    """But for the one import that may fail, in locks.py."""
    found = set()
    for folder in (SOURCES, SOURCES / "converters"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found |= {path.relative_to(SOURCES).as_posix() for name in names if name in POSIX_ONLY}
    assert found == {"storage/locks.py"}
