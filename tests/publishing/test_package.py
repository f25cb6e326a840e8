"""What is published in place of the folder's own files, and that a dry run is this plan."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

from tests.helpers.command_line import invoke
from tests.helpers.loopback import Hub
from tests.helpers.pushes import BASE, FILES, REPO, push


def test_a_card_on_the_hub_is_kept(hub: Hub, adapter: Path) -> None:
    push(adapter)
    text = hub.files(REPO)["README.md"].decode()
    edited = text.replace("library_name: peft\n", "library_name: peft\nlicense: mit\n").replace(
        "# small\n", "# My adapter\n\nTrained on sonnets.\n"
    )
    assert edited != text
    hub.commit(REPO, {"README.md": edited.encode()})
    report = push(adapter)
    assert report.unchanged and report.card == hub.files(REPO)["README.md"].decode() == edited
    stale = edited.replace("6 layers changed", "9 layers changed")
    hub.commit(REPO, {"README.md": stale.encode()})
    assert not push(adapter).unchanged
    assert hub.files(REPO)["README.md"].decode() == edited


def test_the_folders_own_card_comes_first(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    hub.commit(REPO, {"README.md": b"---\nlicense: mit\n---\n# Theirs\n"})
    folder = shutil.copytree(adapter, tmp_path / "own")
    (folder / "README.md").write_text("# Ours\n\nAbout sonnets.\n")
    report = push(folder)
    assert "About sonnets." in report.card and "Theirs" not in report.card
    assert any("the folder's card takes its place" in note for note in report.notes)
    assert push(folder).unchanged


def test_a_base_model_that_is_not_there_is_noted(hub: Hub, adapter: Path) -> None:
    assert any("shows no model bases/llama" in note for note in push(adapter).notes)
    hub.commit(BASE, {"config.json": b"{}"})
    assert push(adapter).notes == []
    for fault in (lambda: hub.answer(f"GET /api/models/{BASE}$", 500), lambda: hub.drop(f"GET /api/models/{BASE}$")):
        fault()
        assert push(adapter).notes == []


def test_dry_run_opens_no_socket(adapter: Path, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, fail)
    result = invoke("push", adapter, REPO, "--base-model", BASE, "--license", "mit", "--dry-run")
    assert result.exit_code == 0
    for words in (*FILES, "org/small, branch main", "nothing sent", "  license: mit", "  <!-- surgery: begin -->"):
        assert words in result.stdout
    report = json.loads(invoke("push", adapter, REPO, "--base-model", BASE, "--dry-run", "--json").stdout)
    assert report["dry_run"] is True and report["out"] is None and report["card"].startswith("---\n")


def test_dry_run_is_the_plan_of_the_push(hub: Hub, adapter: Path) -> None:
    planned, done = push(adapter, dry_run=True), push(adapter)
    assert (planned.files, planned.card, planned.left_out) == (done.files, done.card, done.left_out)
