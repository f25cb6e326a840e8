"""The program's ends: named errors, usage errors, Ctrl-C and signals."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from surgery.adapters import adapter as adapter_files
from surgery.cli.main import main
from surgery.models.base_model import BaseModel
from tests.helpers.bad_input import CONFIG, case, fail, half_then, occupy
from tests.helpers.command_line import contents, flags


@pytest.fixture
def run_main(monkeypatch, capsys) -> Iterator[Callable[..., tuple[Any, str, str]]]:
    """The console script's entry point in this process: its exit code, stdout and stderr."""
    handler = signal.signal(signal.SIGTERM, fail(AssertionError("main sets no handler for SIGTERM")))

    def run(*args: Any) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["surgery", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


# Ctrl-C leaves ^C on the terminal, so click begins a new line.
SAID = r"\n?(Interrupted|Terminated); nothing was written\.\n"


def terminate(*args: Any, **kwargs: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("where", ["reading", "writing"])
@pytest.mark.parametrize(
    ("stop", "code"), [case("ctrl-c", fail(KeyboardInterrupt()), 130), case("sigterm", terminate, 143)]
)
def test_interruption(
    stop, code: int, where: str, replaces: bool, llama: Path, tmp_path: Path, monkeypatch, run_main
) -> None:
    if where == "reading":
        monkeypatch.setattr(BaseModel, "raw_weight", stop)
    else:
        monkeypatch.setattr(adapter_files, "write_tensors", half_then(stop))
    out = occupy(tmp_path / "out") if replaces else tmp_path / "new" / "out"
    before = contents(tmp_path)
    command = ("init", llama, "--method", "inilora", "-o", out, *flags(force=replaces))
    found, stdout, stderr = run_main(*command)
    assert (found, stdout) == (code, "")
    assert re.fullmatch(SAID, stderr)
    assert contents(tmp_path) == before


def test_named_error_ends_the_program_with_1(tmp_path: Path, run_main) -> None:
    code, stdout, stderr = run_main("init", tmp_path, "--method", "vera", "-o", tmp_path / "out", "--json")
    reason = f"{tmp_path / CONFIG}: no such file"
    assert (code, stderr) == (1, f"Error: {reason}\n")
    assert json.loads(stdout) == {"command": "init", "error": reason}


def test_usage_error_ends_the_program_with_2(run_main) -> None:
    code, stdout, stderr = run_main("init", "--method", "vera")
    assert (code, stdout) == (2, "")
    assert stderr.splitlines()[-1] == "Error: Missing argument 'MODEL'."


SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
from surgery.adapters import adapter
from surgery.models import base_model
from surgery.cli.main import main

def wait(*args, **kwargs):
    print("waiting", flush=True)
    time.sleep(60)

def save(path, tensors, metadata):
    path.write_bytes(bytes(1000))
    wait()

if sys.argv.pop(1) == "reading":
    base_model.BaseModel.raw_weight = wait
else:
    adapter.write_tensors = save
main()
"""


@pytest.mark.parametrize(
    ("number", "where", "code"),
    [(signal.SIGINT, "writing", 130), (signal.SIGTERM, "reading", 143)],
)
def test_signal_ends_a_real_process(number, where: str, code: int, llama: Path, tmp_path: Path) -> None:
    out = occupy(tmp_path / "out")
    before = contents(tmp_path)
    command = [sys.executable, "-c", SLOW, where, "init", llama, "--method", "inilora", "-o", out, "--force"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "waiting\n"
            assert (tmp_path / ".out.partial").exists() == (where == "writing")
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code
    assert stdout == ""
    assert re.fullmatch(SAID, stderr)
    assert contents(tmp_path) == before
