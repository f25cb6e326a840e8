"""Names of models: folders first, Hub ids when they look like one, each failure told apart, nothing sent."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from surgery.errors import CheckpointError
from surgery.hub.resolve import local_folder


def test_a_folder_wins(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    assert local_folder("org/name") == Path("org/name")


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "missing", "a/b/c", "~/x"])
def test_what_is_no_hub_id_is_a_missing_folder(name: str, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match="no such folder"):
        local_folder(name)


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder("org/name") == tmp_path
    assert local_folder("org/name@refs/pr/1") == tmp_path
    assert [call[:2] for call in calls] == [("org/name", None), ("org/name", "refs/pr/1")]
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in calls[0][2])


class Answer:
    """What a Hub error carries of its response."""

    status_code, headers, request, text = 404, {}, None, ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("", response=Answer()), "gated"),
        (errors.RepositoryNotFoundError("", response=Answer()), "no such repository"),
        (errors.RevisionNotFoundError("", response=Answer()), "no revision"),
        (errors.LocalEntryNotFoundError(""), "neither in the local cache nor reachable"),
        (ConnectionError(""), "cannot be reached"),
    ],
)
def test_failures_are_told_apart(error: Exception, words: str, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=words):
        local_folder("org/name")


def test_offline_without_a_cache() -> None:
    """The real client, offline as the tests run it."""
    with pytest.raises(CheckpointError, match=r"org/name-that-is-nowhere: .*neither in the local cache"):
        local_folder("org/name-that-is-nowhere")
