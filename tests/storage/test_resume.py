"""Finished parts: whole or not there, kept for the same run alone, gone with the output or an error."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from surgery.errors import OutputError
from surgery.storage import atomic_folder as atomic
from surgery.storage import locks
from surgery.storage import resume as module
from surgery.storage.atomic_folder import PartialFolder, resumable_folder
from surgery.storage.resume import Parts, PartTensors, file_identities, run_key

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int32)}
FACTS = {"energy": 0.1 + 0.2, "notes": ["one", "two"]}


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Every unit is worth a file."""
    monkeypatch.setattr(module, "BYTES", 0)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def files(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f".{out.name}.partial/.parts/*.safetensors"))


def interrupted(out: Path, key: str = "key", units: int = 2) -> None:
    """A run that is interrupted after some units."""
    with pytest.raises(KeyboardInterrupt), resumable_folder(out, key=key) as output:
        for number in range(units):
            output.parts.add(f"unit {number}", {"x": torch.full((3,), float(number))}, FACTS)
        raise KeyboardInterrupt


def test_units_in_memory() -> None:
    parts = Parts()
    parts.add("one", TENSORS, FACTS)
    parts.flush()
    assert not parts.on_disk and list(parts) == ["one"]
    assert same(parts.tensors("one"), TENSORS) and parts.facts("one") == FACTS


def test_units_come_back_from_the_disk(at_once, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), resumable_folder(out, key="key") as output:
        output.parts.add("one", TENSORS, FACTS)
        output.parts.add("two", {}, {"only": "facts"})
        assert output.parts.on_disk and same(output.parts.tensors("one"), TENSORS)
        raise KeyboardInterrupt
    again = PartialFolder(out, "key")
    assert sorted(again.parts) == ["one", "two"]
    assert same(again.parts.tensors("one"), TENSORS) and again.parts.facts("one") == FACTS
    assert again.parts.facts("two") == {"only": "facts"}
    assert same(dict(PartTensors(again.parts, ["one", "two"])), TENSORS)
    again.release()


def test_units_wait_until_they_are_worth_a_file(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "BYTES", 100)
    with resumable_folder(tmp_path / "out", key="key") as output:
        for number in range(5):
            output.parts.add(str(number), {"x": torch.zeros(10)})
            assert len(files(tmp_path / "out")) == (number + 1) // 3
        monkeypatch.setattr(module, "SECONDS", 0.0)
        output.parts.add("late", {})
        assert len(files(tmp_path / "out")) == 2


def test_a_short_run_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, resumable_folder(tmp_path / "new" / "out", key="key") as output:
        output.parts.add("one", TENSORS)
        assert list(tmp_path.iterdir()) == []
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [] and not hasattr(caught.value, "__notes__")


def test_an_interruption_says_what_is_kept(at_once, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, resumable_folder(tmp_path / "out", key="key") as output:
        output.parts.add("one", TENSORS)
        raise KeyboardInterrupt
    (note,) = caught.value.__notes__
    assert "finished parts are kept" in note and str(tmp_path / "out") in note


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed", "empty"])
def test_torn_parts_are_left_out(damage: str, at_once, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out)
    first, _ = files(out)
    content = bytearray(first.read_bytes())
    if damage == "cut":
        os.truncate(first, len(content) - 1)
    elif damage == "flipped":
        content[-1] ^= 1
        first.write_bytes(content)
    elif damage == "renamed":
        first.rename(first.with_name(f"{'0' * 32}.safetensors"))
    else:
        os.truncate(first, 0)
    again = PartialFolder(out, "key")
    assert len(list(again.parts)) == 1 and len(files(out)) == 1
    again.release()


def test_a_half_written_part_is_no_part(at_once, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"

    def killed(tensors, path, metadata) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), resumable_folder(out, key="key") as output:
        output.parts.add("one", TENSORS)
        monkeypatch.setattr(module, "save_file", killed)
        output.parts.add("two", TENSORS)
    monkeypatch.undo()
    again = PartialFolder(out, "key")
    assert list(again.parts) == ["one"]
    again.release()


@pytest.mark.parametrize(("key", "resume"), [("other", True), ("key", False)])
def test_parts_of_another_run_are_not_used(key: str, resume: bool, at_once, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out)
    with resumable_folder(out, key=key, resume=resume) as output:
        assert list(output.parts) == []
        output.parts.add("mine", TENSORS)
        assert len(files(out)) == 1
    assert list(tmp_path.iterdir()) == [out] and list(out.iterdir()) == []


def test_an_error_takes_the_parts_with_it(at_once, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out)
    with pytest.raises(ZeroDivisionError), resumable_folder(out, key="key") as output:
        assert len(list(output.parts)) == 2
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_named_error(at_once, tmp_path: Path, monkeypatch) -> None:
    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OutputError, match=r"out: cannot be written \(No space left"):  # noqa: SIM117
        with resumable_folder(tmp_path / "out", key="key") as output:
            output.parts.add("one", TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_share_parts(at_once, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with resumable_folder(out, key="key") as output:
        output.parts.add("one", TENSORS)
        with pytest.raises(OutputError, match="another run is writing it"), resumable_folder(out, key="key"):
            pass
        assert same(output.parts.tensors("one"), TENSORS)


def test_other_processes_add_to_the_same_folder(at_once, tmp_path: Path) -> None:
    with resumable_folder(tmp_path / "out", key="key") as output:
        folder = output.parts_folder()
        other = PartialFolder(tmp_path / "other", "key")
        other.parts.add("theirs", TENSORS)
        (part,) = files(tmp_path / "other")
        shutil.copy(part, folder)
        output.parts.add("mine", TENSORS)
        assert list(output.parts) == ["mine"]
        output.parts.look()
        assert sorted(output.parts) == ["mine", "theirs"]
        other.release()


def test_parts_of_a_run_that_outlives_its_folder_are_not_used(at_once, tmp_path: Path) -> None:
    """One of several processes goes on after the first was killed, while a run of other options writes the output."""
    interrupted(tmp_path / "old", key="old")
    with resumable_folder(tmp_path / "out", key="new") as output:
        folder = output.parts_folder()
        (stray, _) = files(tmp_path / "old")
        shutil.copy(stray, folder)
        output.parts.look()
        assert list(output.parts) == [] and files(tmp_path / "out") == []


def refused(out: Path, **options) -> None:
    """Another process, as seen from the file system, tries to write the output."""
    with pytest.raises(OutputError, match="another run is writing it"):  # noqa: SIM117
        with resumable_folder(out, **options) as output, output.writing():
            pass


@pytest.mark.parametrize("which", ["leftover", "replaced"])
def test_nobody_begins_in_a_folder_that_is_being_removed(which: str, at_once, tmp_path: Path, monkeypatch) -> None:
    out, remove, tried = tmp_path / "out", shutil.rmtree, []
    if which == "leftover":
        interrupted(out, key="key")
    else:
        out.mkdir()
        (out / "old").write_text("old")

    def meddled(folder: Path, *args, **kwargs) -> None:
        if folder.name == ".out.partial" and not tried:
            tried.append(folder)
            refused(out, key="key", force=True)
        remove(folder, *args, **kwargs)

    monkeypatch.setattr(atomic.shutil, "rmtree", meddled)
    with resumable_folder(out, key="other", force=True) as output, output.writing() as folder:
        (folder / "new").write_text("new")
    assert tried and list(tmp_path.iterdir()) == [out]
    assert [path.name for path in out.iterdir()] == ["new"]


def test_a_folder_that_was_removed_before_it_was_marked_is_not_written_to(at_once, tmp_path: Path, monkeypatch) -> None:
    out, mark = tmp_path / "out", locks.fcntl.flock
    interrupted(out, key="key")

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        shutil.rmtree(tmp_path / ".out.partial")
        mark(descriptor, operation)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    refused(out, key="key")


def test_what_came_to_the_output_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="exists and is not empty"):  # noqa: SIM117
        with resumable_folder(out, key="key") as output, output.writing() as folder:
            (folder / "mine").write_text("mine")
            out.mkdir()
            (out / "theirs").write_text("theirs")
    assert (out / "theirs").read_text() == "theirs" and list(tmp_path.iterdir()) == [out]
    with resumable_folder(out, force=True) as output, output.writing() as folder:
        (folder / "mine").write_text("mine")
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_parts_that_cannot_be_looked_at_do_not_mark_the_folder_for_good(at_once, tmp_path: Path, monkeypatch) -> None:
    def broken(self: Parts) -> None:
        raise OSError(5, "Input/output error")

    interrupted(tmp_path / "out")
    monkeypatch.setattr(Parts, "look", broken)
    for _ in range(2):
        with pytest.raises(OutputError, match="Input/output error"), resumable_folder(tmp_path / "out", key="key"):
            pass


def test_a_replaced_file_is_another_one(tmp_path: Path) -> None:
    """Also where name, size and time are those of the old one."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    before, status = file_identities(tmp_path), path.stat()
    assert file_identities(tmp_path) == before
    (tmp_path / "new").write_bytes(b"two")
    (tmp_path / "new").rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = file_identities(tmp_path)
    assert [entry[:3] for entry in after] == [entry[:3] for entry in before]
    assert after != before


def test_the_key_counts_everything(monkeypatch) -> None:
    keys = {
        run_key("init", {"rank": 8}, {"base": 1}),
        run_key("merge", {"rank": 8}, {"base": 1}),
        run_key("init", {"rank": 9}, {"base": 1}),
        run_key("init", {"rank": 8}, {"base": 2}),
    }
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.add(run_key("init", {"rank": 8}, {"base": 1}))
    monkeypatch.setattr("surgery.storage.resume.__version__", "99")
    keys.add(run_key("init", {"rank": 8}, {"base": 1}))
    assert len(keys) == 6
    assert run_key("init", {"rank": 8, "b": 1}, {}) == run_key("init", {"b": 1, "rank": 8}, {})
