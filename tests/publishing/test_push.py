"""`surgery.push` against a hub on 127.0.0.1, with the real client."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from surgery.errors import HubError
from tests.helpers.command_line import contents
from tests.helpers.loopback import OWNER, STRANGER, Hub
from tests.helpers.pushes import BASE, FILES, REPO, WEIGHTS, push


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


def test_offline(hub: Hub, adapter: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(adapter)
    assert hub.requests == []
