"""The bounded cache: the longest unused goes first, and damage is made again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from surgery.errors import OutputError
from surgery.serving.cache import ENTRY
from surgery.serving.store import Store
from tests.helpers.stores import entries


def test_ids_are_the_same_everywhere(store: Store) -> None:
    code = "from surgery.serving.store import Store; print(Store.id_of('ada'), Store.id_of('team/cy'))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert other.stdout.split() == [str(store.id_of("ada")), str(store.id_of("team/cy"))]
    ids = {Store.id_of(f"user-{number}") for number in range(20_000)}
    assert len(ids) == 20_000 and min(ids) >= 1 and max(ids) < 1 << 53


def test_a_damaged_entry_is_made_again(store: Store) -> None:
    path = store.get("ada") / "adapter_model.safetensors"
    good = {name: each.clone() for name, each in load_file(path).items()}
    path.write_bytes(path.read_bytes()[:-100])
    again = store.get("ada")
    assert again == path.parent and all(torch.equal(load_file(path)[name], each) for name, each in good.items())
    (again / ENTRY).unlink()
    assert (store.get("ada") / ENTRY).is_file()


def test_the_longest_unused_goes_first_and_what_is_leased_stays(store: Store) -> None:
    size = sum(path.stat().st_size for path in store.get("ada").iterdir())
    small = Store(store.folder, store.folder.with_name("small"), 2 * size + 100, dtype="float32")
    ada, bob = small.get("ada"), small.get("bob")
    os.utime(ada, (1, 1))
    os.utime(bob, (2, 2))
    small.get("ada")  # used last now
    small.get("team/cy")
    assert ada.is_dir() and not bob.exists() and small.cache.bytes <= 2 * size + 100
    with small.lease("ada") as path:
        small.get("bob")
        small.get("team/cy")
        assert path.is_dir()
    tiny = Store(store.folder, store.folder.with_name("tiny"), size // 2, dtype="float32")
    with pytest.raises(OutputError, match=r"and the cache may have .*; raise max_bytes"):
        tiny.get("ada")
    assert entries(tiny.cache.folder) == []


def test_a_full_disk_is_a_named_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("surgery.adapters.adapter.write_tensors", full)
        with pytest.raises(OutputError, match="No space left on device"):
            store.get("ada")
    assert entries(store.cache.folder) == [] and store.get("ada").is_dir()
