"""What grows with a model: memory and time by depth, a 70B on one machine, two processes against one.

python benchmarks/scale.py depth                    # peak memory and time at 8 and at 32 layers
python benchmarks/scale.py seventy                  # a folder of Llama-3-70B's shape; its files take no disk
python benchmarks/scale.py layers --layers 1 2 4    # IniLoRA on so many layers of that width, with numbers in them
python benchmarks/scale.py processes                # FRoD and IniLoRA: two processes of one thread against one of two
python benchmarks/scale.py overhead                 # what keeping parts costs a short run
python benchmarks/scale.py threads                  # how far results at two threads are from those at one

Every figure is of a process of its own: peak resident memory, whole and above what its imports take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import LLAMA_3_70B, Llama, minilm_folder, write_llama, write_lora
from benchmarks.process import Measured, alternating, in_process, measured
from surgery.display.tables import table

ROOT = Path(__file__).resolve().parents[1]
DEPTHS = (8, 32)
FLAT = 1.10
# Small enough to be quick, wide enough that a layer's weight is more than what Python holds for it.
NARROW = Llama(num_hidden_layers=8, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, vocab_size=256)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "init vera": ("init", {"method": "vera"}),
    "init inilora": ("init", {"method": "inilora"}),
    "init inilora-alpha": ("init", {"method": "inilora-alpha"}),
    "init inilora-beta": ("init", {"method": "inilora-beta"}),
    "init frod": ("init", {"method": "frod"}),
    "init smoa": ("init", {"method": "smoa"}),
    "merge lora": ("merge", {}),
    "convert lora to lora": ("convert", {"to": "lora", "rank": 4}),
    "convert lora to giva": ("convert", {"to": "giva"}),
    "convert lora to vera": ("convert", {"to": "vera", "rank": 16, "accept_loss": True}),
}


def depth(options: argparse.Namespace) -> None:
    """Peak memory and time of every command at two depths."""
    rows = []
    with _folder(options) as place:
        for layers in DEPTHS:
            shape = replace(NARROW, num_hidden_layers=layers)
            write_llama(place / f"model-{layers}", shape, shards=layers // 8)
            write_lora(place / f"lora-{layers}", shape, 8)
        for name in options.case or CASES:
            found = [_work(name, place, layers) for layers in DEPTHS]
            grown = [found[1][key] / found[0][key] for key in ("whole", "bytes", "cpu")]
            rows.append(
                [name, *(f"{each['whole'] / 1e6:,.0f}" for each in found), f"{grown[0]:.2f}",
                 *(f"{each['bytes'] / 1e6:,.0f}" for each in found), f"{grown[1]:.2f}",
                 f"{grown[2]:.2f}", "flat" if grown[0] <= FLAT else "GROWS"]
            )  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    header = [
        "command",
        "peak 8 (MB)",
        "peak 32",
        "ratio",
        "above imports 8",
        "32",
        "ratio",
        "time ratio",
        "whole peak",
    ]
    print(table(header, rows, right=range(1, 8)))


def seventy(options: argparse.Namespace) -> None:
    """Commands on a folder of Llama-3-70B's shape: 141 GB of zeros that take no disk."""
    with _folder(options) as place:
        write_llama(place / "model-80", LLAMA_3_70B, "BF16", shards=30, sparse=True)
        _write_bf16_lora(place / "lora-80", LLAMA_3_70B, 16)
        size = sum(path.stat().st_size for path in (place / "model-80").iterdir())
        taken = sum(path.stat().st_blocks * 512 for path in (place / "model-80").iterdir())
        print(f"the folder's files are {size / 1e9:.1f} GB long and take {taken / 1e6:.1f} MB of the disk")
        rows = []
        for name in options.case or ("init vera", "inspect", "convert lora to lora", "convert lora to giva"):
            found = _work(name, place, 80)
            rows.append([name, *_seconds(found), f"{found['whole'] / 1e9:.2f}", f"{found['bytes'] / 1e9:.2f}"])
            print(rows[-1], file=sys.stderr, flush=True)
        print(table(["command", "seconds", "of CPU", "peak (GB)", "above imports (GB)"], rows, right=range(1, 5)))


def layers(options: argparse.Namespace) -> None:
    """IniLoRA on a few layers of the 70B's width, with random numbers in them: time by layer, memory."""
    rows = []
    with _folder(options) as place:
        for count in options.layers:
            model = place / f"model-{count}"
            _write_random(model, replace(LLAMA_3_70B, num_hidden_layers=count, vocab_size=256))
            found = _work("init inilora", place, count)
            shutil.rmtree(model)
            rows.append(
                [str(count), *_seconds(found), f"{found['cpu'] / count:.1f}",
                 f"{found['whole'] / 1e9:.2f}", f"{found['bytes'] / 1e9:.2f}"]
            )  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(["layers", "seconds", "of CPU", "by layer", "peak (GB)", "above imports (GB)"], rows, right=range(6)))


def processes(options: argparse.Namespace) -> None:
    """Two processes of one thread each against one of two threads: whole commands, and the work in them."""
    rows = []
    with _folder(options) as place:
        write_llama(place / "random", replace(NARROW, num_hidden_layers=options.depth), shards=1)
        models = {"MiniLM": minilm_folder(), f"random Llama, {options.depth} x {NARROW.hidden_size}": place / "random"}
        for name, model in models.items():
            for method in ("inilora", "frod"):
                sides = [_launched(place, model, method, count) for count in (1, 2)]
                one, two = alternating(options.runs, *sides)
                rows.append(
                    [name, method, *(f"{each[key]:.1f}" for key in ("seconds", "work") for each in (one, two)),
                     f"{one['work'] / two['work']:.2f} x"]
                )  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
    header = ["model", "method", "one process (s)", "two", "its work", "theirs", "gain in the work"]
    print(table(header, rows, right=range(2, 7)))


def overhead(options: argparse.Namespace) -> None:
    """A short run as it is, and one that writes every unit as soon as it is finished."""
    rows = []
    with _folder(options) as place:
        (place / "model-0").symlink_to(minilm_folder())
        for method in ("vera", "inilora", "frod", "smoa"):
            name = f"init {method}"
            sides = [partial(_work, name, place, 0, kept) for kept in ("no", "as it is", "all")]
            found = alternating(options.runs, *sides)
            rows.append([name, *(f"{each['seconds']:.3f} / {each['cpu']:.3f}" for each in found)])
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(["command", "no parts (s / s of CPU)", "as it is", "every unit written"], rows, right=(1, 2, 3)))


def threads(options: argparse.Namespace) -> None:
    """The same start at one thread and at two: the largest relative difference of a tensor (Frobenius norms)."""
    from safetensors.torch import load_file

    rows = []
    with _folder(options) as place:
        (place / "model-0").symlink_to(minilm_folder())
        for method in ("vera", "inilora", "frod", "smoa"):
            found = []
            for count in (1, 2):
                in_process(Path(__file__), "work", json.dumps([f"init {method}", str(place), 0, "as it is"]),
                           threads=count, environment={"KEEP": str(place / f"{method}-{count}")})  # fmt: skip
                found.append(load_file(place / f"{method}-{count}" / "adapter_model.safetensors"))
            differences = {name: _difference(tensor, found[1][name]) for name, tensor in found[0].items()}
            worst = max(differences, key=lambda name: differences[name])
            rows.append([f"init {method}", f"{differences[worst]:.1e}", worst if differences[worst] else "-"])
    print(table(["command", "largest difference", "of"], rows, right=(1,)))


def _difference(one: Any, other: Any) -> float:
    """Norm of the difference over the norm."""
    size = float(one.double().norm())
    return float((one.double() - other.double()).norm()) / size if size else 0.0


def _work(name: str, place: Path, layers: int, kept: str = "as it is") -> Measured:
    return in_process(Path(__file__), "work", json.dumps([name, str(place), layers, kept]))


def work(name: str, place: str, layers: int, kept: str) -> Measured:
    """Do one piece of work, in a process of its own."""
    import peft
    import torch
    import transformers

    import surgery
    from surgery import conversion, initialization, inspection, merging
    from surgery.storage import resume as parts

    transformers.logging.set_verbosity_error()
    assert transformers.LlamaForCausalLM and transformers.BertModel and peft.PeftModel
    assert conversion and initialization and inspection and merging
    if kept != "as it is":
        parts.BYTES, parts.SECONDS = (0, 0.0) if kept == "all" else (1 << 60, 1e9)
    model, lora = Path(place) / f"model-{layers}", Path(place) / f"lora-{layers}"
    command, options = CASES.get(name, (name, {}))
    with tempfile.TemporaryDirectory(dir=place) as folder:
        out = Path(os.environ.get("KEEP", f"{folder}/out"))
        calls: dict[str, Callable[[], Any]] = {
            "init": lambda: surgery.init(model, out=out, **options),
            "merge": lambda: surgery.merge(lora, model, out),
            "convert": lambda: surgery.convert(lora, out=out, **options),
            "inspect": lambda: surgery.inspect(model),
        }

        def once() -> None:
            calls[command]()

        before = time.process_time()
        with torch.no_grad():
            result = measured(once)
    # Time of the processor: what a machine that is shared does not change much.
    return {**result, "whole": _highest(), "cpu": time.process_time() - before}


def launched(model: str, method: str, out: str) -> None:
    """One of the processes that torchrun starts, or the only one: the first says how long the work took."""
    import torch

    import surgery
    from surgery import initialization
    from surgery.system.processes import processes as connected

    assert initialization
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    group = connected(torch.device("cpu"))
    group.wait()
    started = time.perf_counter()
    surgery.init(model, method, out)
    if group.first:
        print(json.dumps({"work": time.perf_counter() - started}))


def _launched(place: Path, model: Path, method: str, count: int) -> Callable[[], Measured]:
    """A run in so many processes on two cores."""

    def run() -> Measured:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            words = [str(Path(__file__)), "launched", json.dumps([str(model), method, f"{folder}/out"])]
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
            variables = {**os.environ, "OMP_NUM_THREADS": str(2 // count), "PYTHONPATH": str(ROOT)}
            variables.update({"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"})
            started = time.perf_counter()
            result = subprocess.run(
                [sys.executable, *start, *words], check=True, capture_output=True, text=True, env=variables
            )
            seconds = time.perf_counter() - started
        return {**json.loads(result.stdout.strip().splitlines()[-1]), "seconds": seconds}

    return run


def _write_bf16_lora(folder: Path, llama: Llama, rank: int) -> None:
    """A LoRA on every linear of a Llama's blocks, bfloat16, as after training."""
    import torch

    from surgery.storage.safetensors_write import Tensor, tensor_bytes, write_file

    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(llama.num_hidden_layers):
        for name, (height, width) in llama.linears().items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            shapes[f"{module}.lora_A.weight"] = (rank, width)
            shapes[f"{module}.lora_B.weight"] = (height, rank)
    entries = {name: Tensor("BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()}
    falling = torch.logspace(0, -1.5, rank)

    def content(name: str) -> Iterator[Any]:
        values = torch.randn(shapes[name], generator=torch.Generator().manual_seed(len(name)))
        return tensor_bytes((values * falling if "lora_B" in name else values).bfloat16())

    write_file(folder / "adapter_model.safetensors", entries, {"format": "pt"}, content)
    targets = sorted({name.rsplit(".", 1)[-1] for name in llama.linears()})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_random(folder: Path, llama: Llama) -> None:
    """A bfloat16 Llama with numbers in it, one tensor at a time; one tensor's numbers do for all of its shape."""
    import torch

    from surgery.storage.safetensors_write import Tensor, tensor_bytes, write_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(llama.config("BF16")), encoding="utf-8")
    entries = {name: Tensor("BF16", shape, 2 * math.prod(shape)) for name, shape in llama.tensors()}

    def content(name: str) -> Iterator[Any]:
        shape = entries[name].shape
        values = torch.empty(shape, dtype=torch.bfloat16)
        return tensor_bytes(values.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name))))

    write_file(folder / "model.safetensors", entries, {"format": "pt"}, content)


def _seconds(found: Measured) -> list[str]:
    return [f"{found[key]:.1f}" for key in ("seconds", "cpu")]


def _highest() -> int:
    """Peak resident memory of this process, its imports included."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@contextlib.contextmanager
def _folder(options: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="scale-", dir=options.folder) as folder:
        yield Path(folder)


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    part.__name__: part for part in (depth, seventy, layers, processes, overhead, threads)
}


def main(arguments: Sequence[str]) -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description="Measure what grows with a model.")
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--case", action="append", help="of depth and seventy; default all")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--depth", type=int, default=12, help="of the random Llama that processes share")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="where files are made; default the system's place for temporary ones")
    options = parser.parse_args(arguments)
    PARTS[options.part](options)


if __name__ == "__main__":
    if sys.argv[1] == "work":
        print(json.dumps(work(*json.loads(sys.argv[2]))))
    elif sys.argv[1] == "launched":
        launched(*json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
