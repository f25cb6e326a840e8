"""Names of models and adapters: folders first, Hub ids when they look like one, each failure told apart."""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import surgery
from surgery.errors import CheckpointError
from surgery.storage.hub_cache import local_folder
from tests.helpers.command_line import invoke
from tests.helpers.hub import make_adapter
from tests.helpers.loopback import OWNER, STRANGER, Hub
from tests.helpers.models import load_base, model_inputs, output

WEIGHTS = "adapter_model.safetensors"


def test_a_folder_wins(tmp_path: Path, monkeypatch, hub: Hub) -> None:
    (tmp_path / "org" / "name" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("org/name") == Path("org/name")
    assert local_folder("org/name/sub") == Path("org/name/sub")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "missing", "a//b", "a/b/../c", "~/x", "-x/y z"])
def test_what_is_no_hub_id_is_a_missing_folder(name: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        local_folder(name)
    assert hub.requests == []


def test_what_is_downloaded(hub: Hub) -> None:
    """Of the repository the top folder alone, or the one that is meant; and no pickle."""
    files = {"config.json": b"{}", "a.safetensors": b"1", "a.bin": b"2", "sub/config.json": b"[]", "sub/x/y.json": b""}
    hub.commit("org/name", files)
    found = local_folder("org/name")
    assert {path.name for path in found.iterdir()} == {"config.json", "a.safetensors"}
    inside = local_folder("org/name/sub")
    assert (inside / "config.json").read_bytes() == b"[]"
    assert [path.name for path in inside.iterdir()] == ["config.json"]
    assert (local_folder("org/name/sub/x") / "y.json").is_file()


def test_revisions(hub: Hub) -> None:
    first = hub.commit("org/name", {"config.json": b"1"})
    hub.commit("org/name", {"config.json": b"2"}, branch="v2.0")
    hub.commit("org/name", {"config.json": b"3"}, branch="refs/pr/1")
    hub.commit("org/name", {"config.json": b"4", "sub/config.json": b"5"})
    names = {"org/name": b"4", "org/name@v2.0": b"2", "org/name@refs/pr/1": b"3", f"org/name@{first}": b"1"}
    for name, content in {**names, "org/name/sub@main": b"5"}.items():
        assert (local_folder(name) / "config.json").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/missing", "no such repository on the Hub"),
        ("org/name@v9", "no revision 'v9'"),
        ("org/name/nowhere", "org/name has no folder nowhere"),
        ("org/gated", "is gated; accept its terms"),
        ("org/secret", "no such repository on the Hub .a private one needs HF_TOKEN"),
        ("org/-x..y", "no such folder, and no repository's name .Repo id must use"),
    ],
)
def test_failures_are_told_apart(name: str, words: str, hub: Hub, monkeypatch) -> None:
    hub.commit("org/name", {"config.json": b"{}"})
    hub.repo("org/gated", gated=True)
    hub.commit("org/gated", {"config.json": b"{}"})
    hub.repo("org/secret", private=True)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(CheckpointError, match=words) as error:
        local_folder(name)
    assert str(error.value).startswith(f"{name}: ") and "\n" not in str(error.value)


def test_private_and_gated_repositories_open_to_their_owner(hub: Hub, monkeypatch) -> None:
    hub.repo("org/secret", private=True, gated=True)
    hub.commit("org/secret", {"config.json": b"{}"})
    assert (local_folder("org/secret") / "config.json").is_file()
    assert hub.tokens_seen == {f"Bearer {OWNER}"}
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{constants.HF_HUB_CACHE}-other")
    with pytest.raises(CheckpointError, match="a private one needs HF_TOKEN"):
        local_folder("org/secret")


@pytest.mark.parametrize(
    ("status", "words"), [(401, "does not accept the token"), (500, "answers 500; try again"), (429, "answers 429")]
)
def test_answers_that_are_errors(status: int, words: str, hub: Hub, waits: list[float]) -> None:
    hub.commit("org/name", {"config.json": b"{}"})
    hub.answer("GET /api/models", status, times=99)
    with pytest.raises(CheckpointError, match=f"org/name: .*{words}"):
        local_folder("org/name")


def test_a_cache_that_cannot_be_written(hub: Hub, monkeypatch, tmp_path: Path) -> None:
    hub.commit("org/name", {"config.json": b"{}"})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(CheckpointError, match=r"org/name: cannot be downloaded into the cache \(Not a directory\)"):
        local_folder("org/name")


def test_unreachable_with_and_without_a_cache(hub: Hub, monkeypatch, waits: list[float]) -> None:
    hub.commit("org/name", {"config.json": b"{}"})
    folder = local_folder("org/name")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    assert local_folder("org/name") == folder
    with pytest.raises(CheckpointError, match=r"org/x: .*cannot be reached at http://127.0.0.1:9 \(ConnectError\)"):
        local_folder("org/x")


def test_offline_with_and_without_a_cache(hub: Hub, monkeypatch) -> None:
    hub.commit("org/name", {"config.json": b"{}", "sub/config.json": b"{}"})
    folder = local_folder("org/name")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder("org/name") == folder
    with pytest.raises(CheckpointError, match=r"org/x: .*not in the local cache, and HF_HUB_OFFLINE is set"):
        local_folder("org/x")
    with pytest.raises(CheckpointError, match="only partly in the local cache, and HF_HUB_OFFLINE is set"):
        local_folder("org/name/sub")
    assert hub.requests == []


def test_a_socket_that_leads_off_the_machine_is_refused(hub: Hub, monkeypatch, waits: list[float]) -> None:
    """The control of all tests here."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://192.0.2.1")
    with pytest.raises(AssertionError, match=r"off this machine was tried: 192\.0\.2\.1"):
        local_folder("org/name")


def test_load_takes_an_id_and_finds_its_base(hub: Hub, llama: Path, tmp_path: Path, monkeypatch) -> None:
    """And again when the Hub is gone: offline, and merely unreachable."""
    adapter = make_adapter("giva", llama, tmp_path / "made")
    (adapter / "plot.png").write_bytes(b"picture")
    hub.publish("bases/llama", llama)
    surgery.push(adapter, "org/small", base_model="bases/llama@main")
    inputs = model_inputs("llama")
    expected = output(surgery.load(adapter, load_base(llama)).eval(), inputs)
    assert torch.equal(output(surgery.load("org/small").eval(), inputs), expected)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert torch.equal(output(surgery.load("org/small").eval(), inputs), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(output(surgery.load("org/small").eval(), inputs), expected)


def test_every_command_takes_ids(hub: Hub, llama: Path, tmp_path: Path, monkeypatch) -> None:
    """Model and adapter by id, with a revision, and in a folder of the repository."""
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter("inilora", llama, tmp_path / "made")
    hub.publish("bases/llama", llama)
    hub.publish("org/small", adapter)
    hub.commit("org/many", {f"one/two/{path.name}": path.read_bytes() for path in adapter.iterdir()}, branch="v1")
    many = "org/many/one/two@v1"
    invoked = [
        invoke("init", "bases/llama", "--method", "vera", "--rank", 4, "-q"),
        invoke("merge", many, "--base", "bases/llama@main", "-o", "merged", "-q"),
        invoke("inspect", "org/small", "-q"),
        invoke("convert", "org/small", "--to", "lora", "-o", "plain", "-q"),
        invoke("compare", "org/small", many, "-q"),
    ]
    assert [result.exit_code for result in invoked] == [0] * 5, [result.stderr for result in invoked]
    assert invoked[0].stdout == "llama-vera\n"
    assert surgery.Adapter.open(many).tensors.keys() == surgery.Adapter.open(adapter).tensors.keys()
    config = surgery.Adapter.open("llama-vera").config
    assert config["base_model_name_or_path"] == "bases/llama"
    assert not any(name.endswith(".bin") for _, _, names in os.walk(constants.HF_HUB_CACHE) for name in names)
