"""`surgery.push` against a hub on 127.0.0.1, with the real client."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

import surgery
from surgery.errors import HubError
from tests.helpers.command_line import contents, invoke
from tests.helpers.hub import make_adapter
from tests.helpers.loopback import OWNER, STRANGER, Hub

WEIGHTS = "adapter_model.safetensors"
FILES = {"README.md", "adapter_config.json", WEIGHTS, "plot.png"}
REPO, BASE = "org/small", "bases/llama"


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA, as PEFT saves it: its base model is a path. With a picture, so that none is drawn."""
    folder = make_adapter("lora", model_folder("llama"), tmp_path_factory.mktemp("lora") / "small")
    (folder / "plot.png").write_bytes(bytes(range(256)) * 12)
    return folder


def push(adapter: Path, **options):
    """Push to the usual place."""
    return surgery.push(adapter, REPO, **{"base_model": BASE, **options})


def changed(adapter: Path, folder: Path) -> Path:
    """A copy of the adapter with one other number."""
    shutil.copytree(adapter, folder)
    opened = surgery.Adapter.open(folder)
    name = min(opened.tensors)
    opened.tensors[name] = opened.tensors[name] + 1
    opened.save(folder, force=True)
    return folder


# What arrives


def test_a_new_repository_gets_one_commit(hub: Hub, adapter: Path) -> None:
    before = contents(adapter)
    report = push(adapter)
    assert report.out == f"{hub.url}/{REPO}"
    assert set(hub.files(REPO)) == FILES == {file.path for file in report.files}
    assert hub.files(REPO)[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
    assert hub.titles(REPO) == [f"LoRA adapter for {BASE}", "initial commit"]
    assert (report.created, report.unchanged, report.private) == (True, False, False)
    assert report.commit == hub.repos[REPO].branches["main"]
    assert {file.path: file.bytes for file in report.files} == {p: len(c) for p, c in hub.files(REPO).items()}
    assert hub.count("POST .*/commit/") == 1 and hub.count(r"PUT /store/\w+$") == 2
    assert contents(adapter) == before


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


# Where to


def test_private(hub: Hub, adapter: Path, monkeypatch) -> None:
    assert push(adapter, private=True).private is True
    assert hub.repos[REPO].private
    assert push(adapter, private=True).unchanged
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(HubError, match=f"{REPO}: eve may not write there"):
        push(adapter)


def test_private_is_not_promised_where_the_repository_is_public(hub: Hub, adapter: Path) -> None:
    hub.repo(REPO)
    with pytest.raises(HubError, match="there already, and public"):
        push(adapter, private=True)
    assert hub.titles(REPO) == ["initial commit"]


def test_revision(hub: Hub, adapter: Path) -> None:
    report = push(adapter, revision="v1/a")
    assert report.out == f"{hub.url}/{REPO}/tree/v1%2Fa"
    assert hub.files(REPO) == {} and set(hub.files(REPO, "v1/a")) == FILES
    assert push(adapter, revision="v1/a").unchanged
    assert 'PeftModel.from_pretrained(base, "org/small", revision="v1/a")' in report.card


def test_pull_request(hub: Hub, adapter: Path, monkeypatch) -> None:
    hub.commit(REPO, {"note.txt": b"theirs"})
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    report = push(adapter, create_pr=True)
    assert report.out == report.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert set(hub.files(REPO)) == {"note.txt"}
    assert set(hub.files(REPO, "refs/pr/1")) == FILES | {"note.txt"}


@pytest.mark.parametrize(("revision", "words"), [(None, "no such repository"), ("v9", "no branch v9")])
def test_a_pull_request_needs_something_to_be_against(revision, words, hub: Hub, adapter: Path) -> None:
    if revision is not None:
        hub.repo(REPO)
    with pytest.raises(HubError, match=words):
        push(adapter, create_pr=True, revision=revision)


# What goes wrong


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_WrongWrongWrongWrongWrongWrong0003", "does not accept the token"),
        (None, "no Hub token: log in"),
        (STRANGER, "eve may not write there"),
    ],
)
def test_tokens(token: str | None, words: str, hub: Hub, adapter: Path, monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=words) as error:
        push(adapter)
    assert token is None or token not in str(error.value)
    assert hub.repos == {}


def test_the_token_given_counts(hub: Hub, adapter: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    push(adapter, token=OWNER)
    assert hub.tokens_seen == {f"Bearer {OWNER}"}


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


def test_offline(hub: Hub, adapter: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(adapter)
    assert hub.requests == []


# Cards that are there


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


# The command


def test_stdout_gets_the_address_alone(hub: Hub, adapter: Path) -> None:
    arguments = ["push", adapter, REPO, "--base-model", BASE]
    result = invoke(*arguments)
    assert result.stdout == f"{hub.url}/{REPO}\n"
    assert "adapter_model.safetensors" in result.stderr and "in a new public repository" in result.stderr
    assert "no commit was made" in invoke(*arguments).stderr
    quiet = invoke(*arguments, "-q")
    assert (quiet.stdout, quiet.stderr) == (f"{hub.url}/{REPO}\n", "")
    report = json.loads(invoke(*arguments, "--json").stdout)
    assert report["command"] == "push" and report["out"] == f"{hub.url}/{REPO}" and report["unchanged"] is True
    assert {"peft_type", "modules", "trainable_parameters", "bytes", "seconds", "files", "commit_url"} <= set(report)


def test_an_error_is_one_line(hub: Hub, adapter: Path) -> None:
    result = invoke("push", adapter, REPO)
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: \S+: names 'model' on a disk, .* --base-model ORG/NAME\n", result.stderr)
    for name in ("no-organisation", "a/b/c", "org/a--b", "org/a..b", "org/-a", "https://host/org/a", f"org/{'a' * 97}"):
        result = invoke("push", adapter, name, "--base-model", BASE, "--dry-run")
        assert result.exit_code == 1 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, name
        assert "is no repository's name" in result.stderr
    assert hub.requests == []


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


def test_the_plan_is_shown_before_anything_is_sent(hub: Hub, adapter: Path) -> None:
    hub.answer("GET /api/whoami", 401)
    result = invoke("push", adapter, REPO, "--base-model", BASE, "--private")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.index("org/small, branch main, private") < result.stderr.index("Error: ")


def test_dry_run_is_the_plan_of_the_push(hub: Hub, adapter: Path) -> None:
    planned, done = push(adapter, dry_run=True), push(adapter)
    assert (planned.files, planned.card, planned.left_out) == (done.files, done.card, done.left_out)
