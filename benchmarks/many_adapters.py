"""What a batch of many tiny adapters costs: seconds for each, and the peak memory of the parent and of the workers.

python benchmarks/many_adapters.py                                  # 100 and 1,000 adapters, two processes
python benchmarks/many_adapters.py --counts 100 1000 10000 --json

Each count is converted by one `surgery convert FOLDER`, and once more, when all are finished and are skipped. Tiny
adapters have almost no work of their own: what is measured is the fixed cost of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import Llama, write_lora
from benchmarks.process import ROOT

TINY = Llama(2, 32, 64, 2, 64)
RANK, RATIO = 4, 2
SECONDS_BETWEEN_LOOKS = 0.25
# The imports and the first adapters end before this share of them: what is resident then is the start.
WARM = 0.1


def write_adapters(folder: Path, count: int) -> None:
    """Write tiny LoRAs, all of the same factors: what differs between them costs nothing."""
    first = write_lora(folder / "adapter-00000", TINY, RANK)
    for index in range(1, count):
        shutil.copytree(first, folder / f"adapter-{index:05}")


def run(folder: Path, out: Path, jobs: int) -> dict[str, Any]:
    """Convert a folder of adapters by the command line.

    Returns:
        Wall and processor seconds, the states counted, and peak resident bytes of the parent and of the largest worker,
        at the end and when a tenth was done.
    """
    command = [sys.executable, "-m", "surgery", "convert", folder, "--to", "giva", "--ratio", RATIO]
    words = [str(word) for word in [*command, "-o", out, "--jobs", jobs, "--json"]]
    total = sum(1 for _ in folder.iterdir())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    peaks, early = {"parent": 0, "worker": 0}, {"parent": 0, "worker": 0}
    before, started = os.times(), time.perf_counter()
    with (
        tempfile.TemporaryFile() as result,
        subprocess.Popen(words, stdout=result, stderr=subprocess.PIPE, env=environment) as process,
    ):
        while process.poll() is None:
            for name, resident in _resident(process.pid).items():
                peaks[name] = max(peaks[name], resident)
            if not any(early.values()) and _finished(out) >= WARM * total:
                early = dict(peaks)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        result.seek(0)
        told = json.loads(result.read())
    after = os.times()
    states = [each["state"] for each in told["adapters"]]
    return {
        "adapters": len(states),
        "states": {state: states.count(state) for state in sorted(set(states))},
        "seconds": time.perf_counter() - started,
        "processor_seconds": sum(after[2:4]) - sum(before[2:4]),
        **{f"{name}_bytes": value for name, value in peaks.items()},
        **{f"{name}_bytes_at_a_tenth": value for name, value in early.items()},
    }


def _finished(out: Path) -> int:
    return sum(1 for each in out.iterdir() if not each.name.startswith(".")) if out.is_dir() else 0


def _resident(parent: int) -> dict[str, int]:
    """The resident bytes of a process, and of the largest of its children."""
    found = {"parent": _status(parent, "VmRSS"), "worker": 0}
    children = Path(f"/proc/{parent}/task/{parent}/children")
    for child in children.read_text(encoding="ascii").split() if children.exists() else ():
        found["worker"] = max(found["worker"], _status(int(child), "VmRSS"))
    return found


def _status(process: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # ended meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def measure(counts: list[int], jobs: int, folder: Path) -> list[dict[str, Any]]:
    """Measure each count, first and again."""
    found = []
    for count in counts:
        adapters, out = folder / f"adapters-{count}", folder / f"out-{count}"
        write_adapters(adapters, count)
        first, again = run(adapters, out, jobs), run(adapters, out, jobs)
        found.append({"count": count, "jobs": jobs, "first": first, "again": again})
        shutil.rmtree(adapters)
        shutil.rmtree(out)
    return found


def show(found: list[dict[str, Any]]) -> None:
    """Print a line for each run, and what an adapter more costs."""
    for each in found:
        for name in ("first", "again"):
            one = each[name]
            states = ", ".join(f"{count} {state}" for state, count in one["states"].items())
            print(
                f"{each['count']:>6} adapters, {name}: {one['seconds']:.1f} s ({one['processor_seconds']:.1f} s of "
                f"processor), parent {one['parent_bytes'] / 1e6:.0f} MB, worker {one['worker_bytes'] / 1e6:.0f} MB "
                f"(at a tenth {one['parent_bytes_at_a_tenth'] / 1e6:.0f} and "
                f"{one['worker_bytes_at_a_tenth'] / 1e6:.0f} MB); {states}"
            )
    for less, more in itertools.pairwise(found):
        for name in ("first", "again"):
            between = more["count"] - less["count"]
            wall, processor = (
                (more[name][figure] - less[name][figure]) / between for figure in ("seconds", "processor_seconds")
            )
            print(f"each adapter more, {name}: {wall * 1e3:.1f} ms, {processor * 1e3:.1f} ms of processor")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000], metavar="N")
    parser.add_argument("--jobs", type=int, default=2, metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(settings.counts, settings.jobs, Path(folder))
    if settings.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
