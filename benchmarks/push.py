"""The memory and time of a push, against a hub on 127.0.0.1 in a process of its own.

python benchmarks/push.py                     # a LoRA of 200 MB, in one piece and in parts
python benchmarks/push.py --megabytes 1000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.process import Measured, in_process, measured

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_OwnerOwnerOwnerOwnerOwnerOwner01"  # of tests/helpers/loopback.py
LIMIT = 150e6
PART = 32 << 20
WIDTH, RANK = 4096, 64


def main() -> None:
    """Measure, print, and exit with 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the adapter")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "HOW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(*arguments.worker)))
        return
    results = compared(arguments.megabytes)
    print(f"{'':24}{'above the imports':>20}{'time':>10}")
    for name, found in results.items():
        print(f"{name:24}{found['bytes'] / 1e6:17.1f} MB{found['seconds']:8.2f} s")
    if max(results[name]["bytes"] for name in results if name.startswith("push")) > LIMIT:
        sys.exit(f"more than {LIMIT / 1e6:.0f} MB")


def compared(megabytes: int) -> dict[str, Measured]:
    """A dry run, a push in one piece, one in parts, and the Hub client's own upload of the folder."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as place:
        folder = made(Path(place) / "adapter", megabytes)
        for name, how, part in (
            ("push --dry-run", "dry-run", None),
            ("push", "push", None),
            ("push, in parts", "push", PART),
            ("client's upload_folder", "client", None),
        ):
            with hub(part) as address:
                environment = {
                    "HF_ENDPOINT": address,
                    "HF_TOKEN": TOKEN,
                    "HF_HOME": str(Path(place) / "home"),
                    "HF_HUB_OFFLINE": "0",
                    "HF_HUB_DISABLE_TELEMETRY": "1",
                    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                }
                found[name] = in_process(
                    Path(__file__), "--worker", str(folder), how, threads=1, environment=environment
                )
    return found


def made(folder: Path, megabytes: int) -> Path:
    """A LoRA of this size, as large language models have it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    count = max(round(megabytes * 1e6 / (2 * WIDTH * RANK * 4)), 1)
    tensors = {}
    for index in range(count):
        start = f"base_model.model.model.layers.{index}.self_attn.q_proj"
        tensors[f"{start}.lora_A.weight"] = torch.randn(RANK, WIDTH)
        tensors[f"{start}.lora_B.weight"] = torch.randn(WIDTH, RANK)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@contextlib.contextmanager
def hub(part: int | None) -> Iterator[str]:
    """A hub in a process of its own; gives its address."""
    script = [sys.executable, str(ROOT / "tests" / "hub" / "loopback.py"), *([str(part)] if part else [])]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def work(folder: str, how: str) -> Measured:
    """One push, in this process, whose imports are done."""
    import surgery.publishing.push

    if how == "client":
        from huggingface_hub import HfApi, constants

        constants.HF_HUB_DISABLE_XET = True
        api = HfApi()
        return measured(lambda: _uploaded(api, folder))
    report: dict[str, Any] = {}

    def push() -> None:
        report["out"] = surgery.push(folder, "org/large", dry_run=how == "dry-run").out

    found = measured(push)
    assert how == "dry-run" or report["out"] == f"{os.environ['HF_ENDPOINT']}/org/large"
    return found


def _uploaded(api: Any, folder: str) -> None:
    api.create_repo("org/large")
    api.upload_folder(repo_id="org/large", folder_path=folder)


if __name__ == "__main__":
    main()
