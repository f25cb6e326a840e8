"""A store of packed adapters under many clients: what each request gets and takes, and what it gets where things fail.

python benchmarks/store.py                                  # 40 adapters, 2 clients
python benchmarks/store.py --adapters 1000 --clients 8      # the case of docs/serving.md
python benchmarks/store.py --json

Clients are processes that ask for adapters at random, with a cache that holds half of them, and read each folder they
get. Meanwhile one more client is killed while it expands; then a file is damaged, and then no file may grow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serving import make_packed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--requests", type=int, help="of all clients together; default twice the adapters")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as place:
        found = measure(Path(place), chosen.adapters, chosen.clients, chosen.requests or 2 * chosen.adapters)
    print(json.dumps(found) if chosen.json else shown(found))


def shown(found: dict[str, Any]) -> str:
    """The figures as text."""
    packed, plain = found["packed_bytes"], found["plain_bytes"]
    lines = [
        f"{found['adapters']} adapters: packed {packed / 1e6:.1f} MB, plain {plain / 1e6:.1f} MB, {plain / packed:.1f} "
        f"times as much; the cache may have {found['limit'] / 1e6:.1f} MB, and has {found['cache_bytes'] / 1e6:.1f} MB",
        f"{found['clients']} clients, {found['seconds']:.0f} s: {found['answers']}",
    ]
    lines += [
        f"  {kind:5} {found[kind]['count']:6} requests, p50 {1e3 * found[kind]['p50']:.2f} ms, p99 "
        f"{1e3 * found[kind]['p99']:.2f} ms"
        for kind in ("cold", "warm")
    ]
    lines.append(f"killed while it expanded: {found['killed']}")
    lines += [f"{name}: {found[name]}" for name in ("damaged", "full_disk")]
    return "\n".join(lines)


def measure(folder: Path, adapters: int, clients: int, requests: int) -> dict[str, Any]:
    """Make a store, let clients ask, and let things fail."""
    import surgery

    first = make_packed(folder / "adapters" / "user-0", 2, 32)
    for number in range(1, adapters):
        copied = folder / "adapters" / f"user-{number}"
        shutil.copytree(first, copied)
        path = copied / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "revision": f"r{number}"}))
    entry = sum(
        file.stat().st_size for file in surgery.Store(folder / "adapters", folder / "size").get("user-0").iterdir()
    )
    limit = entry * max(adapters // 2, clients + 1)
    context = multiprocessing.get_context("spawn")
    victim = context.Process(target=killed_client, args=(folder, limit))
    started = time.perf_counter()
    victim.start()
    with context.Pool(clients) as pool:
        each = [(folder, limit, seed, -(-requests // clients)) for seed in range(clients)]
        answers = [answer for client in pool.starmap(ask, each) for answer in client]
    seconds = time.perf_counter() - started
    victim.join()
    store = surgery.Store(folder / "adapters", folder / "cache", limit)
    hidden = sorted(path.name for path in (folder / "cache").iterdir() if path.name.startswith("."))
    return {
        "adapters": adapters,
        "clients": clients,
        "seconds": seconds,
        "limit": limit,
        "cache_bytes": store.cache.bytes,
        "packed_bytes": sum(path.stat().st_size for path in first.iterdir()) * adapters,
        "plain_bytes": entry * adapters,
        "answers": dict(Counter(what for what, _ in answers)),
        **{kind: quantiles([took for what, took in answers if what == kind]) for kind in ("cold", "warm")},
        "killed": {"exit": victim.exitcode, "left": hidden, "then": outcome(store, "user-1", folder)},
        "damaged": damaged(store, folder),
        "full_disk": full_disk(store, folder),
    }


def quantiles(times: list[float]) -> dict[str, float]:
    """How many there are, the median, and what 99 of 100 do not exceed."""
    ordered = sorted(times)
    at = {f"p{n}": ordered[min(len(ordered) * n // 100, len(ordered) - 1)] if ordered else 0.0 for n in (50, 99)}
    return {"count": len(ordered), **at}


def ask(folder: Path, limit: int, seed: int, count: int) -> list[tuple[str, float]]:
    """What each request of a client got, and its seconds: `cold`, `warm`, or an error's text."""
    from safetensors.torch import load_file

    import surgery

    store = surgery.Store(folder / "adapters", folder / "cache", limit)
    generator, names, answers = random.Random(seed), store.names(), []
    for _ in range(count):
        started = time.perf_counter()
        try:
            lease = store.take(generator.choice(names))
        except surgery.SurgeryError as error:
            answers.append((str(error), 0.0))
            continue
        took = time.perf_counter() - started
        whole = len(load_file(lease.path / "adapter_model.safetensors")) == 28
        answers.append((("cold" if lease.made else "warm") if whole else "half a folder", took))
        lease.release()
    return answers


def killed_client(folder: Path, limit: int) -> None:
    """Ask for an adapter, and be killed when half of its file is written."""
    import surgery
    from surgery.adapters import adapter

    def half(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    store = surgery.Store(folder / "adapters", folder / "cache", limit)
    adapter.write_tensors = half  # type: ignore[assignment]
    for name in reversed(store.names()):
        store.get(name)  # what others have expanded already kills nobody


def outcome(store: Any, name: str, folder: Path) -> str:
    """What a request gets: a folder, or the error's line."""
    import surgery

    try:
        store.get(name)
    except surgery.SurgeryError as error:
        return str(error).replace(f"{folder}/", "")
    return "the folder"


def damaged(store: Any, folder: Path) -> dict[str, str]:
    """One bit of a packed file is another one; then the file is as it was."""
    path = folder / "adapters" / "user-2" / "adapter_model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-20] + bytes([good[-20] ^ 1]) + good[-19:])
    said = outcome(store, "user-2", folder)
    path.write_bytes(good)
    return {"said": said, "then": outcome(store, "user-2", folder)}


def full_disk(store: Any, folder: Path) -> dict[str, str]:
    """The system lets no file of this process grow beyond 10 KB; then it does again."""
    for path in (folder / "cache").glob("user-3-*"):
        shutil.rmtree(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        said = outcome(store, "user-3", folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with contextlib.suppress(StopIteration):
        said += f"; left: {next((folder / 'cache').glob('*user-3-*')).name}"
    return {"said": said, "then": outcome(store, "user-3", folder)}


if __name__ == "__main__":
    main()
