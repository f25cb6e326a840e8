"""Progress: a bar on a terminal, whatever its size; a line every so often without one."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from surgery.cli import progress
from surgery.cli.progress import progress_bar

BAR = """
import time
from surgery.cli.progress import progress_bar
with progress_bar("init frod", wanted=True) as move:
    move(1, 4, "q_proj")
    time.sleep(0.2)
    move(2, 4, "k_proj")
"""


def on_a_terminal(code: str) -> str:
    """Return what a program prints on a standard error that is a terminal of no size."""
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    found = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        found += part
    os.close(ours)
    return found.decode()


def test_a_terminal_without_a_size_shows_a_bar() -> None:
    shown = on_a_terminal(BAR)
    assert "init frod" in shown and "2/4" in shown and "k_proj" in shown and "|" in shown


def test_without_a_terminal_a_line_now_and_then(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    with progress_bar("init frod", wanted=True) as move:
        time.sleep(0.2)
        move(1, 4, "q_proj")
        move(2, 4, "k_proj")
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"init frod: at work for \d+ s", lines[0])
    assert re.fullmatch(r"init frod: 2 of 4 weights, k_proj, about \d+ s left", lines[-1])


def test_bytes_have_a_unit(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    with progress_bar("push", wanted=True, unit="B") as move:
        move(1 << 20, 3 << 20, "")
        time.sleep(0.2)
    assert "push: 1.0 MiB of 3.0 MiB\n" in capsys.readouterr().err


def test_a_short_run_prints_no_line(capsys) -> None:
    with progress_bar("init", wanted=True) as move:
        move(1, 1, "q_proj")
    assert capsys.readouterr().err == ""


def test_none_where_it_is_not_wanted() -> None:
    with progress_bar("init", wanted=False) as move:
        assert move is None


@pytest.mark.parametrize("error", [True, False])
def test_the_thread_ends_with_the_block(error: bool, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)
    try:
        with progress_bar("init", wanted=True):
            if error:
                raise ValueError
    except ValueError:
        pass
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
