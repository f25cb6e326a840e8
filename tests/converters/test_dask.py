"""A batch on a dask cluster of two local processes, one of which is killed in the middle of an adapter.

dask is no dependency: `make cluster` runs this in an environment of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

import surgery
from tests.helpers.tiny_loras import write_loras

distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed: make cluster")

ROOT = Path(__file__).resolve().parents[2]
COUNT, KILLED = 12, "lora-03"
MOST_SECONDS = 300


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A client of a scheduler with two workers, each a process of its own that nobody starts again."""
    with distributed.LocalCluster(n_workers=0, protocol="tcp", host="127.0.0.1", dashboard_address=None) as scheduler:
        call = [sys.executable, "-m", "dask", "worker", scheduler.scheduler_address]
        words = [*call, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        workers = [subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
        try:
            with distributed.Client(scheduler) as client:
                client.wait_for_workers(2, timeout=MOST_SECONDS)
                yield client
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


class Watched(Executor):
    """Another executor, of whose work a log is kept; the process that first comes to one member is killed in it."""

    def __init__(self, inner: Any, log: Path, out: Path) -> None:
        self.inner, self.log, self.out = inner, log, out

    def submit(self, fn: Any, /, *args: Any, **named: Any) -> Future[Any]:
        return self.inner.submit(watched, fn, self.log, self.out, *args)


def watched(work: Any, log: Path, out: Path, member: Any, options: Any) -> Any:
    note(log, "begins", member.name)
    if member.name == KILLED and not log.with_suffix(".killed").exists():
        log.with_suffix(".killed").touch()
        partial = out / f".{KILLED}.partial"
        threading.Thread(target=kill_when_there_is, args=(partial, log), daemon=True).start()
        work(member, options)
        time.sleep(MOST_SECONDS)
    entry = work(member, options)
    note(log, entry.state, member.name)
    return entry


def kill_when_there_is(partial: Path, log: Path) -> None:
    until = time.monotonic() + 20
    while not partial.exists() and time.monotonic() < until:
        time.sleep(0.0005)
    note(log, "killed" if partial.exists() else "killed too late", KILLED)
    os.kill(os.getpid(), signal.SIGKILL)


def note(log: Path, what: str, name: str) -> None:
    with log.open("a") as file:
        file.write(f"{what}|{name}|{os.getpid()}\n")


def test_a_worker_that_is_killed_leaves_its_adapters_to_the_other(cluster: Any, tmp_path: Path) -> None:
    loras, out, log = tmp_path / "loras", tmp_path / "out", tmp_path / "log"
    write_loras(loras, COUNT)
    executor = Watched(cluster.get_executor(), log, out)
    report = surgery.convert([loras], "giva", out, ratio=2, executor=executor)
    lines = [line.split("|") for line in log.read_text().splitlines()]
    began = [(name, process) for what, name, process in lines if what == "begins"]
    assert [what for what, *_ in lines if what.startswith("killed")] == ["killed"]
    killed, by = [process for name, process in began if name == KILLED]
    assert killed != by and len({process for _, process in began}) == 2
    # All are done, each is made once, and nothing half-written is left.
    assert not report.failed and len(report) == COUNT
    made = [name for what, name, _ in lines if what == "done"]
    assert sorted(made) == [f"lora-{index:02}" for index in range(COUNT)]
    assert sorted(path.name for path in out.iterdir()) == sorted(made)
    alone = surgery.convert([loras], "giva", tmp_path / "alone", ratio=2)
    for name, (adapter, _) in zip(sorted(made), alone, strict=True):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (out / name / file).read_bytes() == (tmp_path / "alone" / name / file).read_bytes()
        assert surgery.Adapter.open(out / name).same_as(adapter)
    again = surgery.convert([loras], "giva", out, ratio=2, executor=cluster.get_executor())
    assert {entry.state for entry in again.entries} == {"skipped"}
