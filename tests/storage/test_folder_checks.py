"""Folders from elsewhere: pipes are refused, and links that lead out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from surgery.errors import CheckpointError
from surgery.storage.folder_checks import check_files, check_link


def test_pipes_are_refused_and_links_to_nowhere_are_left_to_their_reader(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    check_files(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe: is a pipe, a socket or a device"):
        check_files(tmp_path)
    with pytest.raises(CheckpointError, match="gone: cannot be read"):
        check_files(tmp_path / "gone")


def test_links_may_stay_in_their_folder_or_lead_to_the_caches_own_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1", tmp_path / "models--a" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("x")
    (tmp_path / "secret").write_text("x")
    (snapshot / "good").symlink_to(blobs / "abc")
    (snapshot / "same").symlink_to(snapshot / "good")
    (snapshot / "bad").symlink_to(tmp_path / "secret")
    for name in ("good", "same"):
        check_link(snapshot / name, snapshot)
    with pytest.raises(CheckpointError, match="bad: is a link that leads out of its folder"):
        check_link(snapshot / "bad", snapshot)
