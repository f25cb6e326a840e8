"""The program's ends: named errors, usage errors, Ctrl-C and signals."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import surgery
from surgery.adapters import adapter as adapter_files
from surgery.cli.main import COMMANDS, main
from surgery.models.base_model import BaseModel
from tests.helpers.bad_input import CONFIG, case, fail, half_then, occupy
from tests.helpers.command_line import contents, flags, invoke
from tests.helpers.init_runs import WEIGHTS, command_named


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


HEAVY = ("torch", "transformers", "peft", "safetensors", "scipy")


@pytest.mark.parametrize(
    "code",
    [
        "import surgery",
        "import surgery.cli",
        *(
            f"import sys; sys.argv[1:] = {args!r}; from surgery.cli import main; main()"
            for args in (
                *(["--help"], ["init", "--help"], ["--version"], ["methods"], ["init", "--method", "nope", "m"]),
                *(["init", "--method", "frod", "no where"], ["merge", "no where", "--base", "m"]),
                *(["convert", "no where", "--to", "lora"], ["inspect", "no where"], ["compare", "no where", "m"]),
                ["train", "no where", "--base", "m", "--data", "d"],
            )
        ),
    ],
)
def test_start_does_not_wait_for_torch(code: str) -> None:
    check = f"import atexit, sys; atexit.register(lambda: print('heavy:', sorted({set(HEAVY)} & set(sys.modules))))\n"
    result = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "heavy: []"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command: list[str], flag: str) -> None:
    result = invoke(*command, flag)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: {' '.join(['surgery', *command])} ")
    assert "Example" in result.stdout


def test_help_lists_every_command() -> None:
    lines = invoke("--help").stdout.partition("Commands:\n")[2].splitlines()
    described = dict(line.split(maxsplit=1) for line in lines)
    assert list(described) == sorted(COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_has_help(name: str) -> None:
    without = [p.name for p in command_named(name).params if isinstance(p, click.Option) and not (p.help or "").strip()]
    assert without == []


@pytest.mark.parametrize("name", list(COMMANDS))
def test_examples_are_valid_command_lines(name: str) -> None:
    command = command_named(name)
    examples = re.findall(r"^\s+surgery (.*)$", command.help, flags=re.MULTILINE)
    assert examples
    for example in examples:
        first, *args = shlex.split(example)
        assert first == name
        command.make_context(name, args)  # raises a usage error where the example is wrong


def test_a_mistyped_command_is_guessed() -> None:
    result = invoke("inspct", "lora")
    assert result.exit_code == 2 and "No such command 'inspct'; did you mean inspect?" in result.output
    assert "mean" not in invoke("coffee").output


def test_version_lists_versions() -> None:
    lines = invoke("--version").stdout.splitlines()
    assert lines[0] == f"surgery {surgery.__version__}"
    versions = dict(line.split() for line in lines)
    assert {"torch", "transformers", "peft", "safetensors", "huggingface-hub", "python"} <= set(versions)
    assert versions["torch"] == torch.__version__


def test_real_process(texted_llama: Path, tmp_path: Path) -> None:
    """The console script: nothing but the result on stdout, nothing of the libraries on stderr, the same file."""
    code = "from surgery.cli import main; main()"
    command = [sys.executable, "-c", code, "init", texted_llama, "--method", "smoa", "-o", "out", "--json"]
    # One thread, as in the tests' own process.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report["out"] == "out"
    surgery.init(texted_llama, "smoa", tmp_path / "library")
    assert contents(tmp_path / "out") == contents(tmp_path / "library")
    assert report["bytes"] == (tmp_path / "out" / WEIGHTS).stat().st_size
