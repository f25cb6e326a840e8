"""A store whose adapters are the repositories of a namespace on the Hub, here one on 127.0.0.1."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_api
from safetensors.torch import load_file

from surgery.errors import AdapterError, OptionError, WrongBaseError
from surgery.serving.store import Store
from tests.helpers.loopback import OWNER, STRANGER, Hub

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def store(hub: Hub, packed: Path, tmp_path: Path) -> Store:
    for name in ("ada", "bob"):
        hub.publish(f"org/{name}", packed)
    hub.requests.clear()
    return Store("hf://org", tmp_path / "cache", dtype="float32", refresh=1000.0)


def commit(hub: Hub, packed: Path, repo: str, **settings: object) -> str:
    config = {**json.loads((packed / "adapter_config.json").read_text()), **settings}
    return hub.commit(repo, {"adapter_config.json": json.dumps(config).encode()})


def test_an_adapter_is_downloaded_when_it_is_first_asked_for(
    store: Store, hub: Hub, packed: Path, tmp_path: Path
) -> None:
    assert hub.requests == []
    (tmp_path / "local" / "ada").mkdir(parents=True)
    for path in packed.iterdir():
        (tmp_path / "local" / "ada" / path.name).write_bytes(path.read_bytes())
    want = load_file(Store(tmp_path / "local", tmp_path / "other", dtype="float32").get("ada") / WEIGHTS)
    assert hub.requests == []  # nothing but hf:// means the Hub
    found = load_file(store.get("ada") / WEIGHTS)
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    assert hub.count(r"GET /org/ada/resolve/.*safetensors") == 1 and hub.count("/org/bob/") == 0
    hub.requests.clear()
    store.get("ada")
    assert hub.requests == []


def test_another_process_asks_for_the_commit_alone(store: Store, hub: Hub) -> None:
    path = store.get("ada")
    hub.requests.clear()
    assert Store("hf://org", store.cache.folder, dtype="float32").get("ada") == path
    assert hub.requests == ["GET /api/models/org/ada"]


def test_a_new_commit_is_expanded_anew_and_a_revision_stays(store: Store, hub: Hub, packed: Path) -> None:
    old = hub.repos["org/ada"].head("main")
    first = store.get("ada")
    commit(hub, packed, "org/ada", base_model_name_or_path="org/new")
    assert store.get("ada") == first  # within `refresh` seconds
    later = Store("hf://org", store.cache.folder, dtype="float32", refresh=0.0)
    assert later.get("ada") != first and later.base_of("ada") == "org/new"
    assert later.base_of(f"ada@{old}") == "org/base"
    with pytest.raises(AdapterError, match="org/ada: the repository has no revision 'v9'"):
        later.get("ada@v9")


def test_what_the_hub_refuses_is_refused(store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterError, match=r"^org/eve: no such repository on the Hub"):
        store.get("eve")
    with pytest.raises(WrongBaseError, match="ada: is for the base model 'org/base', this store serves 'org/other'"):
        Store("hf://org", store.cache.folder, base="org/other").get("ada")
    hub.repos["org/ada"].private = True
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(AdapterError, match="a private one needs HF_TOKEN"):
        Store("hf://org", store.cache.folder, dtype="float32", refresh=0.0).get("ada")
    for name in ("team/cy", "../ada", "ada@"):
        with pytest.raises(AdapterError):
            store.get(name)
    with pytest.raises(OptionError, match="is no namespace of the Hub"):
        Store("hf://org/x", store.cache.folder)
    with pytest.raises(OptionError, match="has no index"):
        store.write_index()


def test_without_the_hub_the_commit_that_was_used_last_counts(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    path = store.get("ada")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    again = Store("hf://org", store.cache.folder, dtype="float32")
    assert again.get("ada") == path
    with pytest.raises(AdapterError, match=r"org/bob: the Hub cannot be reached at http://127\.0\.0\.1:9"):
        again.get("bob")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = Store("hf://org", store.cache.folder, dtype="float32")
    assert offline.get("ada") == path
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE is set"):
        offline.get("bob")


def test_a_download_that_is_not_what_the_hub_says(store: Store, hub: Hub) -> None:
    blob = hub.repos["org/ada"].commits[str(hub.repos["org/ada"].head("main"))].files[WEIGHTS]
    path = hub.folder / str(blob.sha256)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(AdapterError, match=r"org/ada: adapter_model\.safetensors as it was downloaded is not what"):
        store.get("ada")
    assert [each.name for each in store.cache.folder.iterdir()] == [".locks"]
    path.write_bytes(good)
    assert store.get("ada").is_dir()


def test_the_bound_holds_for_downloads_too(store: Store, packed: Path) -> None:
    size = sum(path.stat().st_size for path in store.get("ada").iterdir())
    small = Store("hf://org", store.cache.folder.with_name("small"), int(1.2 * size), dtype="float32")
    for name in ("ada", "bob", "ada"):
        small.get(name)
        assert 0 < small.cache.bytes <= 1.2 * size


def test_the_token_is_nowhere(
    store: Store, hub: Hub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.repos["org/ada"].private = True
    with caplog.at_level(logging.DEBUG):
        store.get("ada")
        with pytest.raises(AdapterError) as error:
            store.get("eve")
    assert f"Bearer {OWNER}" in hub.tokens_seen
    printed = capfd.readouterr()
    assert not any(OWNER in text for text in (caplog.text, str(error.value), printed.out, printed.err))
    files = [path for path in store.cache.folder.rglob("*") if path.is_file()]
    assert files and not any(OWNER.encode() in path.read_bytes() for path in files)


def test_names_are_the_repositories_of_the_namespace(store: Store, hub: Hub, packed: Path) -> None:
    hub.publish("bases/cy", packed)
    assert store.names() == ["ada", "bob"]
