"""The upload: one commit on top of the one it found, repeated where an answer was lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

import surgery
from benchmarks.push import LIMIT, PART, made
from surgery.errors import HubError
from tests.helpers.hub import ROOT
from tests.helpers.loopback import OWNER, Hub
from tests.helpers.pushes import BASE, FILES, REPO, WEIGHTS, push


def changed(adapter: Path, folder: Path) -> Path:
    """A copy of the adapter with one other number."""
    shutil.copytree(adapter, folder)
    opened = surgery.Adapter.open(folder)
    name = min(opened.tensors)
    opened.tensors[name] = opened.tensors[name] + 1
    opened.save(folder, force=True)
    return folder


def test_equal_content_makes_no_commit(hub: Hub, adapter: Path) -> None:
    first = push(adapter)
    again = push(adapter)
    assert (again.unchanged, again.created, again.out, again.commit) == (True, False, first.out, first.commit)
    assert len(hub.titles(REPO)) == 2
    assert hub.count("POST .*/commit/") == 1 and hub.count("PUT /store/") == 2


def test_other_content_makes_a_commit_of_what_changed(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    push(adapter)
    report = push(changed(adapter, tmp_path / "other"), commit_message="Better")
    assert not report.unchanged
    assert hub.titles(REPO)[0] == "Better"
    assert hub.files(REPO)[WEIGHTS] == (tmp_path / "other" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("part_size", [1000, 6887, 6888, None])
def test_large_files_in_parts(part_size: int | None, hub: Hub, adapter: Path) -> None:
    hub.part_size = part_size
    push(adapter)
    assert hub.files(REPO)[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
    sizes = [len(content) for path, content in hub.files(REPO).items() if path.endswith((".safetensors", ".png"))]
    assert (adapter / WEIGHTS).stat().st_size == 6888
    parts = [-(-size // part_size) for size in sizes if part_size is not None and size > part_size]
    assert hub.count(r"PUT /store/\w+/\d+$") == sum(parts)
    assert hub.count("POST /complete/") == len(parts)


@pytest.mark.parametrize("xet", [True, False])
def test_without_xet_files_go_by_lfs(xet: bool, hub: Hub, adapter: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    push(adapter)
    assert set(hub.files(REPO)) == FILES
    assert hub.count("xet-write-token") == (1 if xet else 0)


def test_the_client_alone_does_not_fall_back(hub: Hub, adapter: Path, monkeypatch) -> None:
    """The control: files by their path, with Xet on, on a server without it."""
    monkeypatch.setattr("surgery.publishing.upload.Upload._has_xet", lambda self: True)
    with pytest.raises(HubError):
        push(adapter)
    assert REPO not in hub.repos


def test_progress_counts_every_byte_once(hub: Hub, adapter: Path, tmp_path: Path, waits: list[float]) -> None:
    """What is sent again after a broken connection does not take it back."""
    folder = shutil.copytree(adapter, tmp_path / "large")
    (folder / "plot.png").write_bytes(bytes(range(256)) * 2000)
    hub.drop("PUT /store/", after=600, times=4)
    seen = []
    push(folder, progress=lambda done, total, name: seen.append((done, total, name)))
    assert waits and [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    large = sum(len(content) for path, content in hub.files(REPO).items() if path.endswith((".safetensors", ".png")))
    assert seen[-1][0] == large
    assert {total for _, total, _ in seen} == {sum(len(content) for content in hub.files(REPO).values())}


def test_somebody_elses_commit_in_between(hub: Hub, adapter: Path) -> None:
    hub.repo(REPO)
    hub.before("POST .*/commit/", lambda: hub.commit(REPO, {"note.txt": b"theirs"}))
    with pytest.raises(HubError, match="has changed while this push ran; nothing was pushed"):
        push(adapter)
    assert set(hub.files(REPO)) == {"note.txt"}
    assert push(adapter).commit is not None
    assert set(hub.files(REPO)) == FILES | {"note.txt"}


STEPS = [
    ("whoami", "GET /api/whoami"),
    ("info", f"GET /api/models/{REPO}$"),
    ("create", "POST /api/repos/create"),
    ("branch", "POST .*/branch/"),
    ("validate", "POST /api/validate-yaml"),
    ("preupload", "POST .*/preupload/"),
    ("batch", "POST .*/objects/batch"),
    ("put", "PUT /store/"),
    ("verify", "POST /verify"),
    ("commit", "POST .*/commit/"),
]


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(("step", "pattern"), STEPS, ids=[step for step, _ in STEPS])
def test_what_passes_is_repeated(step, pattern, status, hub: Hub, adapter: Path, waits: list[float]) -> None:
    hub.answer(pattern, status, times=2, Retry_After="7")
    report = push(adapter, revision="v1")
    assert set(hub.files(REPO, "v1")) == FILES and not report.unchanged
    assert len(waits) == 2
    # The client reads what it takes for JSON before it looks at the status.
    assert all(wait >= 7 for wait in waits) or step == "validate"


@pytest.mark.parametrize(("step", "pattern"), STEPS, ids=[step for step, _ in STEPS])
def test_connections_that_break_are_repeated(step, pattern, hub: Hub, adapter: Path, waits: list[float]) -> None:
    """Before the request was read, in the middle of its body, and after it was served."""
    hub.drop(pattern)
    hub.drop(pattern, after=600)
    hub.drop_answer(pattern)
    report = push(adapter, revision="v1")
    assert set(hub.files(REPO, "v1")) == FILES and not report.unchanged
    assert hub.titles(REPO, "v1") == [f"LoRA adapter for {BASE}", "initial commit"]
    assert waits


@pytest.mark.parametrize("pattern", ["PUT /store/", "POST .*/commit/"])
@pytest.mark.parametrize("there", [True, False])
def test_an_upload_that_breaks_off_leaves_the_hub_as_it_was(pattern, there, hub: Hub, adapter, waits) -> None:
    if there:
        hub.commit(REPO, {"note.txt": b"theirs"})
    before = (hub.files(REPO), hub.titles(REPO), dict(hub.repos[REPO].branches)) if there else None
    hub.drop(pattern, after=600, times=99)
    with pytest.raises(HubError, match=r"org/small: the connection to http://127\S+ failed .*; nothing was pushed"):
        push(adapter, revision="v1")
    assert (REPO in hub.repos) == there
    if there:
        assert (hub.files(REPO), hub.titles(REPO), hub.repos[REPO].branches) == before
    hub.faults.clear()
    push(adapter, revision="v1")
    assert set(hub.files(REPO, "v1")) == FILES | ({"note.txt"} if there else set())


def test_a_repository_that_somebody_used_meanwhile_stays(hub: Hub, adapter: Path, waits: list[float]) -> None:
    hub.before("PUT /store/", lambda: hub.commit(REPO, {"note.txt": b"theirs"}))
    hub.answer("POST .*/commit/", 500, times=99)
    with pytest.raises(HubError, match="answers 500; nothing was pushed"):
        push(adapter)
    assert set(hub.files(REPO)) == {"note.txt"}


def test_an_interrupted_push_leaves_the_hub_as_it_was(hub: Hub, adapter: Path) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(adapter, progress=interrupt)
    assert hub.repos == {} and hub.count("POST .*/commit/") == 0


def test_a_pull_request_is_not_opened_twice(hub: Hub, adapter: Path, waits: list[float]) -> None:
    hub.repo(REPO)
    hub.drop_answer("POST .*/commit/")
    with pytest.raises(HubError, match=r"while the pull request was opened; see http\S+/org/small/discussions"):
        push(adapter, create_pr=True)
    assert hub.repos[REPO].pull_requests == 1


def test_what_does_not_pass_is_not_repeated(hub: Hub, adapter: Path, waits: list[float]) -> None:
    hub.answer("POST .*/commit/", 403)
    with pytest.raises(HubError, match="ada may not write there"):
        push(adapter)
    assert waits == [] and hub.count("POST .*/commit/") == 1


def test_200_megabytes(hub: Hub, tmp_path: Path, fresh) -> None:
    """Checked, drawn, hashed and sent, in parts, with less than 150 MB above the imports."""
    folder = made(tmp_path / "adapter", 200)
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size > 199e6
    hub.part_size = PART
    result = fresh(str(ROOT / "benchmarks" / "push.py"), "--worker", str(folder), "push", HF_TOKEN=OWNER)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["bytes"] < LIMIT
    assert set(hub.files("org/large")) == {"README.md", "adapter_config.json", weights.name, "layers.png"}
    assert hub.files("org/large")[weights.name] == weights.read_bytes()
    assert hub.count(r"PUT /store/\w+/\d+$") == -(-weights.stat().st_size // PART)
