"""What a store of packed adapters costs a server: expanding against reading a plain LoRA, and requests of many clients.

python benchmarks/serving.py                    # one adapter of a 7B model's shape; 1,000 small ones and 8 clients
python benchmarks/serving.py --quick            # small shapes: only checks that the script works

Times of reading at 1 GB/s (a local disk) and at 100 MB/s (a network) are computed from the bytes; all others are
measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.process import Measured, in_process, measured

LAYERS = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096)}
MLP = {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
RANK, RATIO = 16, 20
DISK, NETWORK = 1e9, 100e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", nargs=2, metavar=("HOW", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker[0]](Path(arguments.worker[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as place:
        found = {
            "expand": expand(Path(place) / "one", 2 if arguments.quick else 32, 64 if arguments.quick else 1),
            "requests": requests(Path(place) / "many", 20 if arguments.quick else 1000, 2 if arguments.quick else 8),
        }
    print(json.dumps(found) if arguments.json else shown(found))


def shown(found: dict[str, Any]) -> str:
    """The figures as text."""
    one, many = found["expand"], found["requests"]
    plain, packed, work = one["plain_bytes"], one["packed_bytes"], one["expand_seconds"]
    lines = [
        f"one adapter: packed {packed / 1e6:.1f} MB, as a plain LoRA in bf16 {plain / 1e6:.1f} MB",
        f"  expanding   {work:.2f} s, {plain / work / 1e6:.0f} MB/s, peak {one['peak_bytes'] / 1e6:.0f} MB",
        f"  decoding    {one['decode_seconds']:.2f} s of it",
        f"  plain LoRA  read from here {one['read_seconds']:.2f} s, at 1 GB/s {plain / DISK:.2f} s, "
        f"at 100 MB/s {plain / NETWORK:.2f} s",
        f"  packed      at 100 MB/s and expanded {packed / NETWORK + work:.2f} s",
        f"  packed is faster where reading is slower than {(plain - packed) / work / 1e6:.0f} MB/s",
        f"{many['adapters']} adapters, {many['clients']} clients: packed {many['packed_bytes'] / 1e6:.1f} MB, plain "
        f"{many['plain_bytes'] / 1e6:.1f} MB",
    ]
    lines += [
        f"  {kind:5} {many[kind]['count']:6} requests, p50 {1e3 * many[kind]['p50']:.2f} ms, p99 "
        f"{1e3 * many[kind]['p99']:.2f} ms"
        for kind in ("cold", "warm")
    ]
    return "\n".join(lines)


def expand(folder: Path, blocks: int, shrink: int) -> dict[str, Any]:
    """Expanding one adapter, and reading the same as a plain LoRA."""
    packed = make_packed(folder / "adapters" / "one", blocks, shrink)
    worker = Path(__file__)
    cold = in_process(worker, "--worker", "expand", str(folder), threads=1)
    plain = folder / "expanded-plain"
    shutil.copytree(next(path for path in (folder / "cache").iterdir() if path.name.startswith("one-")), plain)
    read = in_process(worker, "--worker", "read", str(plain), threads=1)
    decode = in_process(worker, "--worker", "decode", str(packed), threads=1)
    return {
        "packed_bytes": (packed / "adapter_model.safetensors").stat().st_size,
        "plain_bytes": (plain / "adapter_model.safetensors").stat().st_size,
        "expand_seconds": cold["seconds"],
        "peak_bytes": cold["bytes"],
        "decode_seconds": decode["seconds"],
        "read_seconds": read["seconds"],
    }


def make_packed(folder: Path, blocks: int, shrink: int) -> Path:
    """Save a packed adapter of a large model's shape, made from random factors of falling size."""
    import torch

    import surgery

    generator = torch.Generator().manual_seed(0)
    tensors, weights = {}, 0.7 ** torch.arange(RANK)
    for block in range(blocks):
        for part, layers in (("self_attn", LAYERS), ("mlp", MLP)):
            for name, (height, width) in layers.items():
                stem = f"base_model.model.model.layers.{block}.{part}.{name}"
                A = torch.randn(RANK, width // shrink, generator=generator) * 0.01
                B = torch.randn(height // shrink, RANK, generator=generator) * weights * 0.01
                tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = A, B
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [*LAYERS, *MLP],
    }
    source = surgery.Adapter(config, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    made, _ = surgery.convert(source, "giva", rank=RANK, bits=4)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made.save(folder)
    return folder


def requests(folder: Path, adapters: int, clients: int) -> dict[str, Any]:
    """Requests of several clients for adapters at random, with a cache that holds half of them."""
    first = make_packed(folder / "adapters" / "user-0", 2, 32)
    for number in range(1, adapters):
        copied = folder / "adapters" / f"user-{number}"
        shutil.copytree(first, copied)
        path = copied / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "revision": f"r{number}"}))
    context = multiprocessing.get_context("spawn")
    with context.Pool(clients) as pool:
        limit = _entry_bytes(folder) * adapters // 2
        answers = pool.starmap(client, [(folder, limit, seed, 2 * adapters // clients) for seed in range(clients)])
    packed = sum(path.stat().st_size for path in first.iterdir())
    result: dict[str, Any] = {
        "adapters": adapters,
        "clients": clients,
        "packed_bytes": packed * adapters,
        "plain_bytes": _entry_bytes(folder) * adapters,
    }
    for kind, made in (("cold", True), ("warm", False)):
        times = sorted(seconds for answer in answers for was_made, seconds in answer if was_made is made)
        quantiles = {f"p{n}": times[min(len(times) * n // 100, len(times) - 1)] if times else 0.0 for n in (50, 99)}
        result[kind] = {"count": len(times), **quantiles}
    return result


def client(folder: Path, limit: int, seed: int, count: int) -> list[tuple[bool, float]]:
    """Whether each request had to expand, and its seconds."""
    import surgery

    store = surgery.Store(folder / "adapters", folder / "cache", limit)
    generator, names, times = random.Random(seed), store.names(), []
    for _ in range(count):
        name = generator.choice(names)
        started = time.perf_counter()
        lease = store.take(name)
        times.append((lease.made, time.perf_counter() - started))
        lease.release()
    return times


def _entry_bytes(folder: Path) -> int:
    import surgery

    path = surgery.Store(folder / "adapters", folder / "size").get("user-0")
    return sum(file.stat().st_size for file in path.iterdir())


def work_expand(folder: Path) -> Measured:
    """The first request for an adapter, in a process whose imports are done."""
    import surgery

    store = surgery.Store(folder / "adapters", folder / "cache")
    return measured(lambda: {"path": str(store.get("one"))})


def work_read(folder: Path) -> Measured:
    """Reading a plain LoRA from the disk, as far as it is not in the system's memory."""
    from safetensors.torch import load_file

    def read() -> dict[str, Any]:
        return {"numbers": sum(t.clone().numel() for t in load_file(folder / "adapter_model.safetensors").values())}

    return measured(read)


def work_decode(folder: Path) -> Measured:
    """Opening a packed adapter: its codes are decoded."""
    import surgery.serving.store
    from surgery.formats import peft  # noqa: F401 - what opening imports

    return measured(lambda: {"tensors": len(surgery.Adapter.open(folder).tensors)})


WORKERS = {"expand": work_expand, "read": work_read, "decode": work_decode}

if __name__ == "__main__":
    main()
