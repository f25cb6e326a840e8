"""What a folder leads to outside of itself is not passed on, and what it holds cannot steer a terminal."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.command_line import contents, invoke
from tests.security.conftest import Folders

SECRET = "a-secret-of-the-user"
LINK = "is a link that leads out of its folder; put the file itself there"


@pytest.fixture
def secret(folders: Folders) -> Path:
    path = folders.root / "secret.txt"
    path.write_text(SECRET)
    return path


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.model", "sub/LICENSE"])
def test_merge_copies_no_link_that_leads_out(name: str, secret: Path, folders: Folders) -> None:
    (folders.model / name).parent.mkdir(exist_ok=True)
    (folders.model / name).symlink_to(secret)
    before = contents(folders.root)
    result = invoke(*folders.commands()["merge"])
    assert result.exit_code == 1 and f"{folders.model / name}: {LINK}" in result.stderr
    assert contents(folders.root) == before


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "README.md", "picture.png"])
def test_push_publishes_no_link_that_leads_out(name: str, secret: Path, folders: Folders) -> None:
    (folders.lora / name).unlink(missing_ok=True)
    (folders.lora / name).symlink_to(secret)
    result = invoke(*folders.commands()["push"])
    assert result.exit_code == 1 and f"{folders.lora / name}: {LINK}" in result.stderr
    assert SECRET not in result.stderr + result.stdout


def test_links_inside_a_folder_are_files(folders: Folders) -> None:
    (folders.model / "notes.txt").write_text("x")
    (folders.model / "again.txt").symlink_to("notes.txt")
    assert invoke(*folders.commands()["merge"]).exit_code == 0
    assert (folders.out / "merge" / "again.txt").read_text() == "x"


def test_links_of_the_hubs_cache_are_files(folders: Folders) -> None:
    repository = folders.root / "models--org--base"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folders.model.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    folders.model = snapshot
    assert invoke(*folders.commands()["merge"]).exit_code == 0


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize("name", ["merge", "train", "inspect", "push"])
def test_what_is_no_file_is_refused(name: str, kind: str, folders: Folders) -> None:
    """A pipe would be waited for."""
    if kind == "pipe":
        os.mkfifo(folders.lora / "more.json")
    elif kind == "device":
        (folders.lora / "more.json").symlink_to("/dev/zero")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(folders.lora / "more.json"))
    result = invoke(*folders.commands()[name])
    assert result.exit_code == 1 and "more.json: is a pipe, a socket or a device" in result.stderr


def test_names_cannot_steer_a_terminal(folders: Folders) -> None:
    tensors = load_file(folders.lora / "adapter_model.safetensors")
    first = next(iter(tensors))
    tensors[f"{first}\x1b[2J\x07"] = tensors[first].clone()  # beside the other: half a pair would be refused before
    save_file(tensors, folders.lora / "adapter_model.safetensors")
    result = invoke(*folders.commands()["merge"])
    assert result.exit_code == 1
    assert "\\x1b[2J\\x07" in result.stderr and "\x1b" not in result.stderr
    shown = invoke("inspect", folders.lora, "-v")
    assert "\x1b" not in shown.stdout + shown.stderr and "\x07" not in shown.stdout + shown.stderr


def test_a_long_message_is_cut(folders: Folders) -> None:
    path = folders.lora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["x" * 100_000]}))
    result = invoke(*folders.commands()["inspect"])
    assert result.exit_code == 1 and len(result.stderr) < 2200
