"""What a store of packed adapters costs a server that expands one: against reading the same as a plain LoRA.

python benchmarks/serving.py                    # one adapter of a 7B model's shape, 224 layers of rank 16
python benchmarks/serving.py --quick            # small shapes: only checks that the script works

Times of reading at 1 GB/s (a local disk) and at 100 MB/s (a network) are computed from the bytes; all others are
measured, in one thread. CPU seconds tell what the work takes where others share the processor. Requests of many clients
are in benchmarks/store.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
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
        found = expand(Path(place) / "one", 2 if arguments.quick else 32, 64 if arguments.quick else 1)
    print(json.dumps(found) if arguments.json else shown(found))


def shown(one: dict[str, Any]) -> str:
    """The figures as text."""
    plain, packed, work = one["plain_bytes"], one["packed_bytes"], one["expand_cpu_seconds"]
    lines = [
        f"one adapter: packed {packed / 1e6:.1f} MB, as a plain LoRA in bf16 {plain / 1e6:.1f} MB",
        f"  expanding   {one['expand_seconds']:.2f} s, {work:.2f} s of CPU, {plain / work / 1e6:.0f} MB/s of it, peak "
        f"{one['peak_bytes'] / 1e6:.0f} MB, {one['peak_bytes'] / plain:.2f} of the result",
        f"  decoding    {one['decode_cpu_seconds']:.2f} s of CPU, {plain / one['decode_cpu_seconds'] / 1e6:.0f} MB/s, "
        f"{packed / one['decode_cpu_seconds'] / 1e6:.1f} MB/s of packed bytes",
        f"  plain LoRA  read from here {one['read_seconds']:.2f} s, at 1 GB/s {plain / DISK:.2f} s, "
        f"at 100 MB/s {plain / NETWORK:.2f} s; peak {one['read_peak_bytes'] / 1e6:.0f} MB",
        f"  packed      at 1 GB/s and expanded {packed / DISK + work:.2f} s, "
        f"at 100 MB/s {packed / NETWORK + work:.2f} s",
        f"  packed is faster where reading is slower than {(plain - packed) / work / 1e6:.0f} MB/s",
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
        "expand_cpu_seconds": cold["cpu_seconds"],
        "peak_bytes": cold["bytes"],
        "decode_seconds": decode["seconds"],
        "decode_cpu_seconds": decode["cpu_seconds"],
        "read_seconds": read["seconds"],
        "read_peak_bytes": read["bytes"],
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


def work_expand(folder: Path) -> Measured:
    """The first request for an adapter, in a process whose imports are done."""
    import surgery

    store = surgery.Store(folder / "adapters", folder / "cache")
    return measured(lambda: with_cpu(lambda: store.get("one")))


def with_cpu(work: Callable[[], object]) -> dict[str, Any]:
    """The CPU seconds of this process for a piece of work."""
    started = time.process_time()
    work()
    return {"cpu_seconds": time.process_time() - started}


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

    return measured(lambda: with_cpu(lambda: surgery.Adapter.open(folder, compact=True)))


WORKERS = {"expand": work_expand, "read": work_read, "decode": work_decode}

if __name__ == "__main__":
    main()
