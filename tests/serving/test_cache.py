"""The bounded cache: the longest unused goes first, and damage is made again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("room", [0, 100, 5_000])
def test_a_file_that_the_system_does_not_let_grow_leaves_nothing(room: int, store: Store) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OutputError, match="File too large") as error:
            store.get("ada")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and str(store.cache.folder) in str(error.value)
    assert [path.name for path in store.cache.folder.iterdir()] == [".locks"] and store.get("ada").is_dir()


def _killed_while_it_writes(folder: Path, cache: Path) -> None:
    """Ask for an adapter, and be killed when half of its file is written."""
    from surgery.adapters import adapter

    def half(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    adapter.write_tensors = half  # type: ignore[assignment]
    Store(folder, cache, dtype="float32").get("ada")


def test_a_kill_while_it_is_written_leaves_no_half_folder(store: Store) -> None:
    victim = multiprocessing.get_context("fork").Process(
        target=_killed_while_it_writes, args=(store.folder, store.cache.folder)
    )
    victim.start()
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL and entries(store.cache.folder) == []
    left = [path for path in store.cache.folder.iterdir() if path.name not in (".locks",)]
    assert [(path.name[:5], (path / "adapter_model.safetensors").read_bytes()) for path in left] == [(".ada-", b"half")]
    with ThreadPoolExecutor(4) as pool:
        leases = list(pool.map(lambda _: store.take("ada"), range(4)))
    assert sum(lease.made for lease in leases) == 1
    load_file(leases[0].path / "adapter_model.safetensors")
    for lease in leases:
        lease.release()
    assert not left[0].exists()
