"""Folders are written beside their place and renamed: whatever fails leaves what was there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.adapters import adapter as adapter_files
from surgery.errors import OutputError
from surgery.storage.safetensors_write import write_tensors
from tests.helpers.bad_input import WEIGHTS, case, check_refused, fail, half_then, occupy
from tests.helpers.command_line import contents, invoke


def test_finished_run_removes_what_a_killed_one_left(llama: Path, tmp_path: Path) -> None:
    occupy(tmp_path / ".out.partial")
    assert invoke("init", llama, "--method", "vera", "-o", tmp_path / "out", "-q").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def flip_byte(offset: int) -> Callable[..., None]:
    """A `write_tensors` on a disk that changes one bit."""

    def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, str]:
        digests = write_tensors(path, tensors, metadata)
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)
        return digests

    return save


LAST_TENSOR = "model.layers.2.self_attn.v_proj.inilora_B0"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize(
    ("save", "words"),
    [
        case("disk-full", half_then(fail(FULL)), (WEIGHTS, "No space left on device", "nothing was changed")),
        case("data-corrupted", flip_byte(-1), (LAST_TENSOR, "read back differs")),
        case("header-corrupted", flip_byte(20), ("read back",)),
    ],
)
def test_writing_fails(save, words, replaces: bool, llama: Path, tmp_path: Path, monkeypatch) -> None:
    """Whether an older output is replaced, or even the folders above the output are new."""
    monkeypatch.setattr(adapter_files, "write_tensors", save)
    out = occupy(tmp_path / "out") if replaces else tmp_path / "new" / "folders" / "out"
    check_refused(tmp_path, OutputError, ("out:", *words), llama, out=out, force=replaces)


def test_config_is_read_back(llama: Path, tmp_path: Path, monkeypatch) -> None:
    write_json = adapter_files.write_json

    def cut(path: Path, value: Any) -> None:
        write_json(path, value)
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(adapter_files, "write_json", cut)
    check_refused(tmp_path, OutputError, ("adapter_config.json", "cannot be read back"), llama)


@contextlib.contextmanager
def small_files_only(size: int) -> Iterator[None]:
    """Let the system refuse to write larger files, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_system_refuses_to_write_more(llama: Path, tmp_path: Path) -> None:
    with small_files_only(8192):
        check_refused(tmp_path, OutputError, ("out", WEIGHTS, "nothing was changed"), llama)


@pytest.fixture
def renaming(monkeypatch) -> Callable[[BaseException | None], None]:
    """A system that cannot swap two folders in one step, on which the second renaming ends in an error."""

    def prepare(error: BaseException | None) -> None:
        rename = os.rename

        def second_fails(source: Path, target: Path) -> None:
            if error is not None and Path(source).name == ".out.partial":
                raise error
            rename(source, target)

        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
        monkeypatch.setattr(os, "rename", second_fails)

    return prepare


def test_output_is_replaced_without_a_swap(renaming, llama: Path, tmp_path: Path) -> None:
    renaming(None)
    out = occupy(tmp_path / "out")
    surgery.init(llama, "vera", out, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not (out / "precious.txt").exists()
    assert (out / WEIGHTS).is_file()


def test_second_renaming_fails(renaming, llama: Path, tmp_path: Path) -> None:
    renaming(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    out = occupy(tmp_path / "out")
    check_refused(tmp_path, OutputError, ("out:", "Permission denied"), llama, out=out, force=True)


def test_second_renaming_is_interrupted(renaming, llama: Path, tmp_path: Path) -> None:
    renaming(KeyboardInterrupt())
    out = occupy(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        surgery.init(llama, "vera", out, force=True)
    assert contents(tmp_path) == before
