"""Output paths: what stands there is kept, replaced or refused before any work."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import OutputError
from tests.helpers.bad_input import WEIGHTS, case, check_refused, occupy
from tests.helpers.command_line import invoke
from tests.helpers.texts import text_rows, write_rows


def test_output_is_checked_before_the_model_is_loaded(learner: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("surgery.initialization.init.gradient_run", lambda *args, **kwargs: pytest.fail("it was run"))
    occupy(tmp_path / "out")
    data = write_rows(tmp_path / "data.jsonl", text_rows(4))
    check_refused(tmp_path, OutputError, ("--force",), learner, "giva", data=data)


def test_output_that_is_not_empty_is_kept_or_replaced(llama: Path, tmp_path: Path) -> None:
    out = occupy(tmp_path / "out")
    check_refused(tmp_path, OutputError, ("PLACE/out:", "not empty", "-o", "--force"), llama)
    check_refused(tmp_path, OutputError, ("PLACE/out:", "--force"), llama, dry_run=True)
    assert invoke("init", llama, "--method", "inilora", "-o", out, "--force", "-q").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", WEIGHTS, "surgery.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_empty_folder_is_no_hindrance(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert invoke("init", llama, "--method", "vera", "-o", tmp_path / "out", "-q").exit_code == 0


def make_file(place: Path) -> Path:
    (place / "file").write_text("precious")
    return place / "file"


def link_to_folder(place: Path) -> Path:
    occupy(place / "elsewhere")
    (place / "link").symlink_to(place / "elsewhere")
    return place / "link"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        case("file", make_file, ("PLACE/file:", "not a folder")),
        case("below-a-file", lambda place: make_file(place) / "deep" / "out", ("PLACE/file is not a folder",)),
        case("link", link_to_folder, ("PLACE/link:",)),
        case("name-too-long", lambda place: place / ("x" * 300), ("xxx",)),
    ],
)
def test_output_that_cannot_be_a_folder(prepare, words, force: bool, llama: Path, tmp_path: Path) -> None:
    check_refused(tmp_path, OutputError, words, llama, out=prepare(tmp_path), force=force)


def test_parent_without_permission(llama: Path, tmp_path: Path, monkeypatch) -> None:
    access = os.access
    denied = lambda path, mode: False if Path(path) == tmp_path else access(path, mode)  # noqa: E731
    monkeypatch.setattr("surgery.storage.atomic_folder.os.access", denied)
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        check_refused(tmp_path, OutputError, ("out:", "no permission to write in PLACE"), llama, out=out)


def test_parent_that_refuses_a_folder(llama: Path, tmp_path: Path, monkeypatch) -> None:
    mkdir = Path.mkdir

    def denied(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", denied)
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        check_refused(tmp_path, OutputError, ("out:", "Permission denied", "nothing was changed"), llama, out=out)


@pytest.mark.parametrize("out", ["base/model", "base"])
def test_force_never_replaces_the_base_model(out: str, llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "base" / "model"))
    check_refused(tmp_path, OutputError, (f"PLACE/{out}:",), model, out=tmp_path / out, force=True)


@pytest.mark.parametrize(
    ("out", "force"),
    [
        case("itself", ".", False),
        case("above", "..", True),
        case("above-by-its-name", "../../deep", True),
    ],
)
def test_working_directory_is_never_replaced(out: str, force: bool, llama: Path, tmp_path: Path, monkeypatch) -> None:
    here = tmp_path / "deep" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    check_refused(tmp_path, OutputError, (f"Error: {out}:",), llama, out=Path(out), force=force)
