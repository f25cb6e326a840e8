"""The store: what each request gets, alone and beside others, and where files, names, disks and processes fail."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery.errors import AdapterError, OptionError, OutputError, SurgeryError, WrongBaseError
from surgery.formats.vllm import VLLM
from surgery.serving.store import INDEX, Store
from tests.helpers.adapters import make_adapter, weight_changes
from tests.helpers.exports import lora
from tests.helpers.stores import entries
from tests.serving.conftest import edit


def test_a_request_gets_the_lora_that_peft_computes(store: Store, packed: Path, llama: Path) -> None:
    found, want = dict(VLLM.changes(store.get("ada"))), weight_changes(llama, packed)
    assert found.keys() == want.keys()
    assert all(torch.allclose(found[name].double(), want[name], atol=1e-5) for name in want)
    assert store.names() == ["ada", "bob", "team/cy"]
    assert json.loads((store.get("team/cy") / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_second_request_expands_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.get("ada")
    before = (path / "adapter_model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("surgery.serving.store.plain_parts", None)
    assert store.get("ada") == path and Store(store.folder, store.cache.folder, dtype="float32").get("ada") == path
    assert (path / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_concurrent_requests_for_one_name_expand_once(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        leases = list(pool.map(lambda _: store.take("ada"), range(24)))
    assert sum(lease.made for lease in leases) == 1 and len({lease.path for lease in leases}) == 1
    for lease in leases:
        lease.release()


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "ada/../../x", "/etc", "ada//x", ".hidden", "a\\b", "a\0b", "a\nb", "x" * 300, "ada/"]
)
def test_names_cannot_escape(name: str, store: Store) -> None:
    with pytest.raises(AdapterError, match="is no name of an adapter"):
        store.get(name)


def test_links_cannot_escape(store: Store, packed: Path) -> None:
    (store.folder / "out").symlink_to(packed)
    with pytest.raises(AdapterError, match="link that leads out of the store"):
        store.get("out")
    (store.folder / "twin").symlink_to("ada")
    assert store.get("twin").is_dir()


def test_absent_and_wrong_base(store: Store) -> None:
    with pytest.raises(AdapterError, match="'eve': there is no adapter of this name"):
        store.get("eve")
    other = Store(store.folder, store.cache.folder, base="org/other")
    with pytest.raises(WrongBaseError, match="ada: is for the base model 'org/base', this store serves 'org/other'"):
        other.get("ada")
    assert Store(store.folder, store.cache.folder, base="org/base").get("ada").is_dir()


def test_a_replaced_adapter_is_expanded_anew(store: Store) -> None:
    first = store.get("ada")
    edit(store.folder / "ada", base_model_name_or_path="org/new")
    second = store.get("ada")
    assert (
        second != first
        and json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/new"
    )


def test_a_damaged_adapter_is_a_named_error_and_leaves_nothing(store: Store) -> None:
    path = store.folder / "ada" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=r"checksum|damaged|codes"):
        store.get("ada")
    assert entries(store.cache.folder) == [] and store.get("bob").is_dir()


def test_the_index_tells_damage_that_the_format_does_not(store: Store, llama: Path) -> None:
    make_adapter(llama, store.folder / "plain", lora())
    assert store.write_index() == 4 and (store.folder / INDEX).is_file()
    path = store.folder / "plain" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=r"is not what surgery-store\.json says"):
        store.get("plain")
    assert store.get("ada").is_dir()


def test_options(store: Store, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder of adapters"):
        Store(tmp_path / "none", tmp_path / "cache")
    with pytest.raises(OptionError, match="unknown target"):
        Store(store.folder, tmp_path / "cache", target="tgi")
    with pytest.raises(OptionError, match="is no size"):
        Store(store.folder, tmp_path / "cache", "many")
    with pytest.raises(OptionError, match="reads no dtype"):
        Store(store.folder, tmp_path / "cache", dtype="int8")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the cache cannot be made"):
        Store(store.folder, tmp_path / "file" / "cache")


def _client(folder: Path, cache: Path, size: int, seed: int, requests: int, answers: Path) -> None:
    """Ask for adapters at random, read what comes, and write down what went wrong."""
    store = Store(folder, cache, size, dtype="float32")
    generator, wrong = random.Random(seed), []
    names = store.names()
    for _ in range(requests):
        name = generator.choice(names)
        try:
            with store.lease(name) as path:
                load_file(path / "adapter_model.safetensors")
        except (OSError, SurgeryError) as error:
            wrong.append(f"{name}: {error}")
    answers.write_text(json.dumps(wrong))


def test_many_processes_with_a_small_cache_and_a_kill_in_the_middle(packed: Path, tmp_path: Path) -> None:
    for number in range(12):
        shutil.copytree(packed, tmp_path / "adapters" / f"user-{number}")
        edit(tmp_path / "adapters" / f"user-{number}", revision=f"r{number}")
    first = Store(tmp_path / "adapters", tmp_path / "cache", dtype="float32")
    size = sum(path.stat().st_size for path in first.get("user-0").iterdir())
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "adapters", tmp_path / "cache", 5 * size)
    clients = [
        context.Process(target=_client, args=(*arguments, seed, 40, tmp_path / f"answers-{seed}")) for seed in range(3)
    ]
    victim = context.Process(target=_client, args=(*arguments, 99, 100_000, tmp_path / "none"))
    for each in (*clients, victim):
        each.start()
    until = time.monotonic() + 60
    while len(entries(tmp_path / "cache")) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    for each in clients:
        each.join(120)
    assert [json.loads((tmp_path / f"answers-{seed}").read_text()) for seed in range(3)] == [[], [], []]
    after = Store(*arguments, dtype="float32")
    for name in after.names():
        load_file(after.get(name) / "adapter_model.safetensors")
    assert after.cache.bytes <= 5 * size
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == [".locks"]
