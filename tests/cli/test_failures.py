"""`--json` on failure: one object on stdout, for every command and every kind of failure."""

from __future__ import annotations

import json

import pytest

from surgery.cli.main import COMMANDS
from surgery.errors import SurgeryError
from tests.helpers.command_line import invoke

MISSING = {
    "compare": ["missing", "missing"],
    "convert": ["missing", "--to", "lora"],
    "init": ["missing", "--method", "frod"],
    "inspect": ["missing"],
    "merge": ["missing", "--base", "missing"],
    "push": ["missing", "org/name"],
    "train": ["missing", "--base", "missing", "--data", "missing"],
}


@pytest.mark.parametrize("command", sorted(MISSING))
def test_a_named_error(command: str) -> None:
    result = invoke(command, *MISSING[command], "--json")
    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert found["command"] == command and "missing" in found["error"]
    assert result.stderr.splitlines()[-1] == f"Error: {found['error']}"
    assert invoke(command, *MISSING[command]).stdout == ""


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_usage_error(command: str) -> None:
    result = invoke(command, "--json", "--no-such-option")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["command"] == command and "--no-such-option" in found["error"]
    assert "Usage: surgery" in result.stderr


def test_an_unknown_command() -> None:
    result = invoke("coffee", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"command": None, "error": "No such command 'coffee'."}


def test_a_word_after_two_dashes_is_no_option() -> None:
    result = invoke("inspect", "--", "--json", "more")
    assert result.exit_code == 2 and result.stdout == ""


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("surgery.inspection.inspect.inspect", broken)
    with pytest.raises(ZeroDivisionError):
        invoke("inspect", "org/x", "--json")


def test_tokens_are_not_repeated() -> None:
    token = "hf_" + "a" * 30
    result = invoke("inspect", token, token, "--json")
    assert token not in result.output and "***" in json.loads(result.stdout)["error"]


def test_interrupted(monkeypatch) -> None:
    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.inspection.inspect.inspect", stopped)
    result = invoke("inspect", "org/x", "--json")
    assert result.exit_code == 1  # 130 from the console script, see test_main
    assert json.loads(result.stdout)["error"].startswith("Interrupted; nothing was written")


def test_another_process_tells(monkeypatch) -> None:
    def failed(*args: object, **options: object) -> None:
        error = SurgeryError("no")
        error.told = True
        raise error

    monkeypatch.setattr("surgery.inspection.inspect.inspect", failed)
    result = invoke("inspect", "org/x", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "")
