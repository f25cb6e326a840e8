"""Long runs that are killed or interrupted go on where they stopped, and come to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import surgery
from surgery.errors import SurgeryError
from surgery.storage import resume as parts_module
from surgery.storage.atomic_folder import PartialFolder
from surgery.storage.resume import Parts
from tests.helpers.command_line import contents, invoke
from tests.helpers.conversions import trained
from tests.helpers.models import edit_tensors, load_base, save_model

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as the processes that are killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def at_once(monkeypatch) -> None:
    """Every unit is worth a file."""
    monkeypatch.setattr(parts_module, "BYTES", 0)
    monkeypatch.setattr(parts_module, "SECONDS", 0.0)


def trained_lora(model: Path, out: Path) -> Path:
    """A LoRA on all linears of the tiny Llama."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return trained(load_base(model), config, out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in one file and in several, a LoRA of it, and the adapter of full rank that is converted."""
    folder = tmp_path_factory.mktemp("resume")
    save_model("llama", folder / "model")
    save_model("llama-bf16-sharded", folder / "shards")
    trained_lora(folder / "model", folder / "lora")
    adapter, _ = surgery.init(folder / "model", "frod", None, target=["q_proj", "v_proj"], sparse_rate=0.05)
    for name, tensor in adapter.tensors.items():
        if name.endswith("_s"):
            tensor.fill_(0.1)
    adapter.save(folder / "frod")
    return folder


def init(method: str, **options: Any) -> Run:
    return lambda place, out, **more: surgery.init(place / "model", method, out, **{**options, **more})


def convert(source: str, to: str, **options: Any) -> Run:
    def run(place: Path, out: Path, **more: Any) -> Any:
        return surgery.convert(place / source, to, out, base=place / "model", **{**options, **more})

    return run


def merge(place: Path, out: Path, **more: Any) -> Any:
    return surgery.merge(place / "lora", place / "shards", out, **more)


# name -> the run, and how many units it has
RUNS: dict[str, tuple[Run, int]] = {
    "inilora": (init("inilora"), 21),
    "inilora-bf16": (init("inilora", dtype="bfloat16"), 21),
    "inilora-alpha": (init("inilora-alpha"), 21),
    "frod": (init("frod"), 7),
    "frod-seeded": (init("frod", store_bases=False), 7),
    "smoa": (init("smoa"), 21),
    "smoa-seeded": (init("smoa", store_bases=False), 21),
    "smoa-components": (init("smoa", variant="components"), 21),
    "vera": (init("vera"), 1),
    "frod to lora": (convert("frod", "lora", rank=4), 6),
    "frod to giva": (convert("frod", "giva", rank=4), 6),
    "lora to smoa": (convert("lora", "smoa", accept_loss=True), 21),
    "lora to smoa blocks": (convert("lora", "smoa", accept_loss=True, variant="blocks"), 21),
    "lora to frod": (convert("lora", "frod", accept_loss=True), 7),
    "merge": (merge, 0),
}


def stop_after(units: int, monkeypatch, act: Callable[[], None]) -> list[str]:
    """Let something happen when so many units are finished; returns the names of all that are."""
    add = Parts.add
    added: list[str] = []

    def counting(self: Parts, name: str, *args: Any) -> None:
        add(self, name, *args)
        added.append(name)
        if len(added) == units:
            act()

    monkeypatch.setattr(Parts, "add", counting)
    return added


def interrupt() -> None:
    raise KeyboardInterrupt


def killed(name: str, place: Path, out: Path, units: int) -> None:
    """Run in a process that is killed when so many units are finished. A fork of this one would lack its threads."""
    code = "import sys; from tests.test_resume import die; die(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, str(place), str(out), str(units)]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], check=False, capture_output=True, timeout=120)
    assert found.returncode == -signal.SIGKILL, found.stderr


def die(name: str, place: str, out: str, units: str) -> None:
    """Begin a run, and kill this process."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "BYTES", 0)
        patch.setattr(parts_module, "SECONDS", 0.0)
        stop_after(int(units), patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        RUNS[name][0](Path(place), Path(out))


@pytest.mark.parametrize("name", RUNS)
def test_goes_on_after_an_interruption(name: str, place: Path, tmp_path: Path, monkeypatch) -> None:
    run, units = RUNS[name]
    run(place, tmp_path / "expected")
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        before = stop_after(min(3, units) or 3, patch, interrupt)
        run(place, out)
    assert "finished parts are kept" in caught.value.__notes__[0]
    assert {path.name for path in tmp_path.iterdir()} == {"expected", ".out.partial"}
    with monkeypatch.context() as patch:
        after = stop_after(0, patch, interrupt)
        run(place, out)
    assert not set(before) & set(after)
    assert not units or len(before) + len(after) == units
    assert {path.name for path in tmp_path.iterdir()} == {"expected", "out"}
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.parametrize("name", ["inilora", "frod", "lora to smoa", "merge"])
def test_goes_on_after_a_kill(name: str, place: Path, tmp_path: Path, monkeypatch) -> None:
    run, _ = RUNS[name]
    run(place, tmp_path / "expected")
    killed(name, place, tmp_path / "out", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"expected", ".out.partial"}
    added = stop_after(0, monkeypatch, interrupt)
    run(place, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"expected", "out"}
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert len(set(added)) == len(added) > 0


@pytest.mark.parametrize("name", ["inilora", "lora to smoa", "merge"])
def test_an_error_leaves_nothing(name: str, place: Path, tmp_path: Path, monkeypatch) -> None:
    def fail() -> None:
        raise SurgeryError("broken")

    stop_after(2, monkeypatch, fail)
    with pytest.raises(SurgeryError, match="broken"):
        RUNS[name][0](place, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def interrupted(run: Run, place: Path, out: Path, monkeypatch, **options: Any) -> list[str]:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        added = stop_after(2, patch, interrupt)
        run(place, out, **options)
    return added


CHANGED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("inilora", {}, {"seed": 1}),
    ("inilora", {}, {"rank": 4}),
    ("inilora", {}, {"dtype": "bfloat16"}),
    ("inilora", {}, {"target": ["q_proj", "k_proj"]}),
    ("smoa", {}, {"groups": 3}),
    ("smoa", {}, {"variant": "components"}),
    ("smoa", {}, {"branch_ranks": [20, 12]}),
    ("frod", {}, {"sparse_rate": 0.3}),
    ("lora to smoa", {}, {"seed": 1}),
    ("lora to smoa", {}, {"rank": 6}),
    ("lora to smoa", {}, {"variant": "blocks"}),
    ("merge", {}, {"dtype": "float32"}),
    ("inilora", {}, {"resume": False}),
    ("lora to smoa", {}, {"resume": False}),
    ("merge", {}, {"resume": False}),
]


@pytest.mark.parametrize(("name", "first", "second"), CHANGED)
def test_parts_of_other_options_are_not_used(name, first, second, place: Path, tmp_path: Path, monkeypatch) -> None:
    run, _ = RUNS[name]
    run(place, tmp_path / "expected", **second)
    before = interrupted(run, place, tmp_path / "out", monkeypatch, **first)
    added = stop_after(0, monkeypatch, interrupt)
    run(place, tmp_path / "out", **second)
    assert set(before) <= set(added) or "target" in second
    assert {path.name for path in tmp_path.iterdir()} == {"expected", "out"}
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_control_parts_without_a_key_would_be_used(place: Path, tmp_path: Path, monkeypatch) -> None:
    run, _ = RUNS["inilora-alpha"]
    run(place, tmp_path / "expected", seed=1)
    monkeypatch.setattr("surgery.initialization.init.run_key", lambda *args: "the same")
    interrupted(run, place, tmp_path / "out", monkeypatch, seed=0)
    run(place, tmp_path / "out", seed=1)
    assert contents(tmp_path / "out") != contents(tmp_path / "expected")


@pytest.mark.parametrize("name", ["inilora", "lora to smoa", "merge"])
@pytest.mark.parametrize("what", ["model", "lora"])
def test_parts_of_other_files_are_not_used(name: str, what: str, tmp_path: Path, monkeypatch) -> None:
    """The same paths, sizes and times, but other numbers."""
    if name == "inilora" and what == "lora":
        pytest.skip("reads no adapter")
    place = tmp_path / "place"
    save_model("llama", place / "model")
    (place / "shards").symlink_to(place / "model")
    trained_lora(place / "model", place / "lora")
    run, _ = RUNS[name]
    if name == "merge":
        monkeypatch.setattr(PartialFolder, "keep", lambda self: (self.parts.flush(), True)[1])
    interrupted_at = 1 if name == "merge" else 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(interrupted_at, patch, interrupt)
        run(place, tmp_path / "out")
    path = place / what / ("model.safetensors" if what == "model" else "adapter_model.safetensors")
    status = path.stat()
    edit_tensors(path.parent, lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()], path.name)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    run(place, tmp_path / "out")
    run(place, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_weight_file_that_was_changed_is_written_again(place: Path, tmp_path: Path, monkeypatch) -> None:
    merge(place, tmp_path / "expected")
    (first, *_) = interrupted(merge, place, tmp_path / "out", monkeypatch)
    path = tmp_path / ".out.partial" / first
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    added = stop_after(0, monkeypatch, interrupt)
    merge(place, tmp_path / "out")
    assert first in added
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_reports_are_those_of_a_run_in_one_go(place: Path, tmp_path: Path, monkeypatch) -> None:
    for name in ("inilora", "merge"):
        run, _ = RUNS[name]
        found = []
        for out, stopped in ((tmp_path / name / "one", False), (tmp_path / name / "two", True)):
            if stopped:
                interrupted(run, place, out, monkeypatch)
            result = run(place, out)
            report = (result[1] if isinstance(result, tuple) else result).to_dict()
            found.append({key: value for key, value in report.items() if key not in {"seconds", "out"}})
        assert found[0] == found[1]


@pytest.mark.parametrize("command", ["init", "convert", "merge"])
def test_command_line(command: str, place: Path, tmp_path: Path, monkeypatch) -> None:
    words = {
        "init": ["init", place / "model", "--method", "inilora"],
        "convert": ["convert", place / "lora", "--to", "smoa", "--base", place / "model", "--accept-loss"],
        "merge": ["merge", place / "lora", "--base", place / "shards"],
    }[command]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        before = stop_after(2, patch, interrupt)
        assert invoke(*words, "-o", out, "-q").exit_code != 0
    assert (tmp_path / ".out.partial").exists()
    with monkeypatch.context() as patch:
        added = stop_after(0, patch, interrupt)
        assert invoke(*words, "-o", out, "-q", "--no-resume").exit_code == 0
    assert set(before) < set(added)
    assert list(tmp_path.iterdir()) == [out]
