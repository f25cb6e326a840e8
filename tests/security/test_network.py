"""No command opens a socket, where what it is told is on the disk; no token is shown."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.helpers.command_line import invoke
from tests.security.conftest import Folders

COMMANDS = list(Folders(Path()).commands())
TOKEN = "hf_abcdefghijABCDEFGHIJabcdefghijAB34"


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tried with sockets, each of which is refused; the libraries think that they are online."""
    found: list[str] = []

    def refuse(name: str) -> Any:
        def refused(*args: Any, **kwargs: Any) -> Any:
            found.append(f"{name} {args[-1:]}")
            raise OSError("no network here")

        return refused

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse(name))
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse(name))
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_work_without_a_network(name: str, tried: list[str], folders: Folders) -> None:
    result = invoke(*folders.commands()[name])
    assert result.exit_code == 0, result.stderr
    assert tried == []


def test_a_hub_id_would_be_looked_for(tried: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    result = invoke("inspect", "org/name")
    assert tried and result.exit_code == 1
    assert "cannot be reached" in result.stderr
    assert TOKEN not in result.stderr + result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_no_token_is_shown(name: str, tried: list[str], folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    """Not even under -v, and not where something fails."""
    arguments = [*folders.commands()[name], "-v"]
    shown = invoke(*arguments)
    os.truncate(folders.lora / "adapter_model.safetensors", 100)
    os.truncate(folders.model / "model.safetensors", 100)
    failed = invoke(*arguments)
    assert failed.exit_code == 1
    assert TOKEN not in shown.stdout + shown.stderr + failed.stdout + failed.stderr + caplog.text


def test_a_token_in_a_message_is_taken_out(tmp_path: Path) -> None:
    result = invoke("inspect", tmp_path / TOKEN)
    assert result.exit_code == 1 and TOKEN not in result.stderr and "***" in result.stderr
