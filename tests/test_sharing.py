"""Processes and devices that share out the layers come to the bytes of one."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import CheckpointError, OutputError
from surgery.initialization import init as initialization
from surgery.initialization.weight_start import Sharing
from surgery.methods.registry import method_infos
from surgery.storage import resume as parts_module
from surgery.system import devices
from surgery.system.processes import Processes
from tests.helpers.command_line import contents
from tests.helpers.models import edit_tensors, save_model
from tests.helpers.processes import launch

METHODS = tuple(info.name for info in method_infos() if not info.reads_gradients)
SCRIPT = """
import json, sys, surgery
for method in json.loads(sys.argv[1]):
    adapter, report = surgery.init("model", method, f"two/{method}")
    sys.stdout.write(json.dumps([method, report.bytes, len(adapter.tensors), report.notes]) + "\\n")  # in one piece
adapter, _ = surgery.init("model", "inilora")
assert all(tensor.isfinite().all() for tensor in adapter.tensors.values())
sys.stdout.write(json.dumps(["in memory", 0, len(adapter.tensors), []]) + "\\n")
"""
BROKEN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose shares are unequal, and one with a weight that is not finite."""
    folder = tmp_path_factory.mktemp("sharing")
    save_model("llama", folder / "model")
    save_model("llama", folder / "broken")
    edit_tensors(folder / "broken", lambda tensors: tensors[BROKEN].fill_(float("nan")))
    (folder / "script.py").write_text(SCRIPT)
    return folder


def test_two_processes_write_the_bytes_of_one(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)  # the configuration has the base's name as it was given
    result = launch(place, "script.py", json.dumps(METHODS))
    assert result.returncode == 0, result.stderr
    said = sorted(json.loads(line) for line in result.stdout.splitlines())
    assert len(said) == 2 * (len(METHODS) + 1)
    assert said[::2] == said[1::2]
    for method in METHODS:
        _, report = surgery.init("model", method, tmp_path / method)
        assert contents(place / "two" / method) == contents(tmp_path / method)
        assert [method, report.bytes] in [line[:2] for line in said]
    assert sorted(path.name for path in (place / "two").iterdir()) == sorted(METHODS)


def test_an_error_of_one_process_ends_all_with_one_line(place: Path) -> None:
    command = str(Path(sys.executable).with_name("surgery"))
    result = launch(place, "--no-python", command, "init", "broken", "--method", "inilora", "-o", "new/out")
    assert result.returncode != 0 and result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1 and BROKEN in lines[0] and "NaN" in lines[0]
    assert not (place / "new").exists()


def test_a_full_disk_of_any_process_is_a_named_error(tmp_path: Path, monkeypatch) -> None:
    """Here of the second one, which hears from the first where the parts are."""

    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    said = iter([[None, None], [str(tmp_path / "failed-1"), None], [None, None]])
    monkeypatch.setattr(Processes, "gathered", lambda self, value: next(said))
    monkeypatch.setattr(parts_module, "save_file", full)
    monkeypatch.setattr(parts_module, "BYTES", 0)
    with Sharing.open(Processes(1, 2), Path("new/out"), False, "key", True) as sharing:  # noqa: SIM117
        with pytest.raises(OutputError, match=r"new/out: cannot be written \(No space left on device\)"):
            sharing.parts.add("unit", {"x": torch.zeros(3)})


def test_a_failure_of_another_run_stops_none(place: Path, tmp_path: Path, monkeypatch) -> None:
    """A process that outlives its run says in the hidden folder that it has failed."""
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: str(tmp_path))
    monkeypatch.setattr(Processes, "gathered", lambda self, value: [value, None])
    with Sharing.open(Processes(0, 2), None, False, "", True) as sharing:
        for name in ("failed", f"failed-{'0' * 32}"):
            (tmp_path / name).touch()
        assert not sharing.failed()
        sharing.fail()
        assert sharing.failed()


@pytest.mark.parametrize(("costs", "count"), [([5.0, 1, 1, 1, 1, 1], 2), ([1.0] * 7, 3), ([2.0], 2), ([], 2)])
def test_every_piece_has_one_process(costs: list[float], count: int) -> None:
    shares = [Processes(rank, count).share(costs) for rank in range(count)]
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    loads = [sum(costs[piece] for piece in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


@pytest.fixture
def two_devices(monkeypatch) -> None:
    """Two devices, both of them the CPU."""
    monkeypatch.setattr(initialization, "working_devices", lambda device: [device, torch.device("cpu", 0)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at_once", [True, False])
def test_two_devices_write_the_bytes_of_one(
    method: str, at_once: bool, place: Path, tmp_path: Path, two_devices, monkeypatch
) -> None:
    if at_once:
        monkeypatch.setattr(parts_module, "BYTES", 0)
    surgery.init(place / "model", method, tmp_path / "two")
    monkeypatch.undo()
    surgery.init(place / "model", method, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_both_devices_work(place: Path, two_devices, monkeypatch) -> None:
    """Each waits for the other inside its first layer."""
    meeting = threading.Barrier(2, timeout=30)
    workers: set[int] = set()
    read = surgery.initialization.weight_start._Reader.__call__

    def meet(self, site):
        if threading.get_ident() not in workers:
            workers.add(threading.get_ident())
            meeting.wait()
        return read(self, site)

    monkeypatch.setattr(surgery.initialization.weight_start._Reader, "__call__", meet)
    surgery.init(place / "model", "inilora")
    assert len(workers) == 2


def test_an_error_on_one_device_ends_all(place: Path, tmp_path: Path, two_devices) -> None:
    with pytest.raises(CheckpointError, match=BROKEN):
        surgery.init(place / "broken", "inilora", tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_cuda_means_every_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices.working_devices(torch.device("cuda")) == [torch.device("cuda", index) for index in range(3)]
    assert devices.working_devices(torch.device("cuda:1")) == [torch.device("cuda:1")]
    assert devices.working_devices(torch.device("cpu")) == [torch.device("cpu")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert devices.working_devices(torch.device("cuda")) == [torch.device("cuda")]
