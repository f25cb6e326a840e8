"""`surgery.convert` of many adapters: each is tried, finished ones are skipped, what changed is made again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import surgery
from surgery.converters import batch as batch_module
from surgery.errors import SurgeryError
from tests.helpers.batches import truncate
from tests.helpers.conversions import WEIGHTS


def states(report: surgery.BatchReport) -> dict[str, str]:
    return {entry.adapter: entry.state for entry in report.entries}


def stamps(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob(f"*/{WEIGHTS}")}


def test_a_bad_member_costs_its_own_entry_alone(loras: Path, tmp_path: Path) -> None:
    truncate(loras / "b")
    (loras / "d").mkdir()
    (loras / "d" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    seen, steps = [], set()
    report = surgery.convert(
        [loras], "giva", tmp_path / "out", ratio=2, on_entry=lambda entry, done, of: seen.append((done, of)),
        progress=lambda done, total, what: steps.add(what.partition(":")[0]),
    )  # fmt: skip
    assert steps == {"a", "c"}
    assert states(report) == {"a": "done", "b": "failed", "c": "done", "d": "failed"}
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)] and len(report) == 4 and len(report.failed) == 2
    assert sorted(stamps(tmp_path / "out")) == ["a", "c"]
    assert WEIGHTS in str(report.entries[1].error) and report.entries[3].kind == "PROMPT_TUNING"
    alone, _ = surgery.convert(loras / "a", "giva", ratio=2)
    assert alone.same_as(report[0][0])
    with pytest.raises(SurgeryError, match=r"b: .*safetensors"):
        _ = report[1]
    told = report.to_dict()["adapters"]
    assert [bool(each.get("error")) for each in told] == [False, True, False, True]
    assert told[0]["weight_error"] > 0 and told[0]["sites"] and told[0]["state"] == "done"


def test_a_second_run_makes_what_changed_and_nothing_else(loras: Path, tmp_path: Path) -> None:
    first = surgery.convert([loras], "giva", tmp_path / "out", ratio=2)
    before = stamps(tmp_path / "out")
    again = surgery.convert([loras], "giva", tmp_path / "out", ratio=2)
    assert set(states(again).values()) == {"skipped"} and stamps(tmp_path / "out") == before
    # What a skipped member's entry says is what the first run said.
    for old, new in zip(first, again, strict=True):
        assert (new[1].bytes, new[1].weight_error, new[1].kept) == (old[1].bytes, old[1].weight_error, old[1].kept)
    tensors = load_file(loras / "b" / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, loras / "b" / WEIGHTS)
    assert states(surgery.convert([loras], "giva", tmp_path / "out", ratio=2)) == {
        "a": "skipped", "b": "done", "c": "skipped"
    }  # fmt: skip
    # A file that was touched has the same bytes.
    os.utime(loras / "a" / WEIGHTS)
    (tmp_path / "out" / "c" / WEIGHTS).write_bytes(b"")
    found = states(surgery.convert([loras], "giva", tmp_path / "out", ratio=2))
    assert found == {"a": "skipped", "b": "skipped", "c": "done"}
    assert set(states(surgery.convert([loras / "a"], "giva", tmp_path / "out", ratio=3)).values()) == {"done"}
    assert set(states(surgery.convert([loras / "a"], "giva", tmp_path / "out", ratio=3, force=True)).values()) == {
        "done"
    }


def test_an_output_that_is_not_a_batchs_is_left_alone(loras: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "notes.txt").write_text("mine")
    report = surgery.convert([loras], "giva", tmp_path / "out", ratio=2)
    assert states(report) == {"a": "failed", "b": "done", "c": "done"}
    assert "not empty" in str(report.entries[0].error)
    assert (tmp_path / "out" / "a" / "notes.txt").read_text() == "mine"


def test_processes_do_what_one_does(loras: Path, tmp_path: Path) -> None:
    truncate(loras / "b")
    report = surgery.convert([loras], "giva", tmp_path / "two", ratio=2, jobs=2)
    surgery.convert([loras], "giva", tmp_path / "one", ratio=2)
    assert states(report) == {"a": "done", "b": "failed", "c": "done"}
    for name in "ac":
        assert (tmp_path / "one" / name / WEIGHTS).read_bytes() == (tmp_path / "two" / name / WEIGHTS).read_bytes()


def test_any_executor_will_do(loras: Path, tmp_path: Path) -> None:
    class Losing(ThreadPoolExecutor):
        """One of whose workers is lost."""

        def submit(self, fn: Any, /, *args: Any, **named: Any) -> Future[Any]:
            if args[0].name == "b":
                lost: Future[Any] = Future()
                lost.set_exception(RuntimeError("the worker is gone"))
                return lost
            return super().submit(fn, *args, **named)

    with Losing(1) as executor:
        report = surgery.convert([loras], "giva", tmp_path / "out", ratio=2, executor=executor)
    assert states(report) == {"a": "done", "b": "failed", "c": "done"}
    assert "the worker is gone" in str(report.entries[1].error)


def test_an_executor_that_breaks_costs_what_it_has_not_finished(loras: Path, tmp_path: Path) -> None:
    with Breaking("b") as executor:
        report = surgery.convert([loras], "giva", tmp_path / "out", ratio=2, executor=executor)
    assert states(report) == {"a": "done", "b": "failed", "c": "failed"}
    for entry in report.failed:
        assert "the executor broke" in str(entry.error) and "with a new executor goes on" in str(entry.error)
    with Breaking("-") as executor:
        again = surgery.convert([loras], "giva", tmp_path / "out", ratio=2, executor=executor)
    assert states(again) == {"a": "skipped", "b": "done", "c": "done"}
    # One that was broken, or shut down, before the call takes nothing, and costs no traceback.
    assert set(states(surgery.convert([loras], "giva", tmp_path / "o", ratio=2, executor=executor)).values()) == {
        "failed"
    }


class Breaking(ProcessPoolExecutor):
    """One process, which is killed at a member; the later ones wait until then."""

    def __init__(self, killed: str) -> None:
        super().__init__(1, get_context("fork"))
        self.killed = killed

    def submit(self, fn: Any, /, *args: Any, **named: Any) -> Future[Any]:
        return super().submit(killed_at, self.killed, fn, *args)


def killed_at(name: str, work: Any, member: Any, options: Any) -> Any:
    if member.name == name:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(member, options)


def test_threads_of_one_process_take_turns(loras: Path, tmp_path: Path, monkeypatch: Any) -> None:
    inside, most = [], []

    def watched(member: Any, options: Any) -> Any:
        inside.append(member.name)
        most.append(len(inside))
        time.sleep(0.02)
        inside.remove(member.name)
        return real_work(member, options)

    monkeypatch.setattr(batch_module, "_work", watched)
    with ThreadPoolExecutor(3) as executor:
        report = surgery.convert([loras], "giva", tmp_path / "out", ratio=2, executor=executor)
    assert not report.failed and most == [1, 1, 1]


def test_a_killed_process_costs_the_member_that_it_was_at(loras: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SURGERY_TEST_KILLED", "b")
    monkeypatch.setattr(batch_module, "_work", dying_work)
    report = surgery.convert([loras], "giva", tmp_path / "out", ratio=2, jobs=2)
    assert states(report) == {"a": "done", "b": "failed", "c": "done"}
    assert report.entries[1].error == "its process was killed"


real_work = batch_module._work


def dying_work(member: Any, options: Any) -> Any:
    if member.name == os.environ["SURGERY_TEST_KILLED"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real_work(member, options)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interruption_says_what_is_finished(jobs: int, loras: Path, tmp_path: Path) -> None:
    for number in range(40):
        shutil.copytree(loras / "a", loras / f"n{number:02}")
    call = [sys.executable, "-m", "surgery", "convert", loras, "--to", "giva", "--ratio", "2"]
    process = subprocess.Popen(
        [*map(str, call), "-o", str(tmp_path / "out"), "--jobs", str(jobs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    until = time.monotonic() + 120
    while len(stamps(tmp_path / "out")) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert "of 43 adapters are finished and in" in told and "nothing was written" not in told
    said = int(told.partition(" of 43 adapters")[0].split()[-1])
    assert 1 <= said <= len(stamps(tmp_path / "out")) < 43
    finished = set(stamps(tmp_path / "out"))
    for number in range(39):  # one of them that was not finished is enough to go on with
        if f"n{number:02}" not in finished:
            shutil.rmtree(loras / f"n{number:02}")
    report = surgery.convert([loras], "giva", tmp_path / "out", ratio=2)
    assert not report.failed and sum(entry.state == "skipped" for entry in report.entries) >= said
