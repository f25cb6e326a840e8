"""Measuring a piece of work in a process of its own: seconds, and peak memory above what its imports take."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Measured", "alternating", "command_seconds", "in_process", "measured", "median"]

ROOT = Path(__file__).resolve().parents[1]
STATUS = Path("/proc/self/status")
Measured = dict[str, Any]


def measured(work: Callable[[], Mapping[str, Any] | None], device: str = "cpu") -> Measured:
    """Run `work` once, in a process whose imports are done.

    Args:
        work: may return further figures.
        device: on a GPU, work is waited for, and torch's peak there is taken too.

    Returns:
        `seconds`, `bytes` (peak resident memory above what was resident at the start), on a GPU `gpu_bytes`, and
        what the work returned.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:
        import torch

        # Makes the context, which is no more part of the work than an import is.
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    gc.collect()
    before = _start_of_peak()
    started = time.perf_counter()
    extra = work() or {}
    if on_gpu:
        torch.cuda.synchronize(device)
    result = {"seconds": time.perf_counter() - started, "bytes": _peak_bytes() - before, **extra}
    if on_gpu:
        result["gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    return result


def in_process(
    script: Path, *arguments: str, threads: int | None = None, environment: Mapping[str, str] | None = None
) -> Measured:
    """Run a script that prints one JSON object as its last line, in a fresh process.

    Args:
        script: the script.
        arguments: its command line.
        threads: of torch, BLAS and LAPACK.
        environment: further variables.

    Returns:
        The object, with `process_seconds` for the whole process.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(threads)
    variables.update(environment or {})
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(script), *arguments], check=False, capture_output=True, text=True, env=variables
    )
    if result.returncode:
        raise RuntimeError(f"{script.name} {' '.join(arguments)} failed:\n{result.stderr[-3000:]}")
    value: Measured = json.loads(result.stdout.strip().splitlines()[-1])
    value["process_seconds"] = time.perf_counter() - started
    return value


def command_seconds(*command: str) -> Measured:
    """Wall time of a whole command, its start included."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return {"seconds": time.perf_counter() - started}


def alternating(runs: int, *sides: Callable[[], Measured]) -> list[Measured]:
    """Measure every side `runs` times, in turn (A B A B), so that a busy spell of the machine hits all alike.

    Returns:
        One measurement for each side: the median of each figure.
    """
    taken: list[list[Measured]] = [[] for _ in sides]
    for _ in range(runs):
        for side, results in zip(sides, taken, strict=True):
            results.append(side())
    return [median(results) for results in taken]


def median(results: Sequence[Measured]) -> Measured:
    """The median of each figure over several measurements; what is no number is the first's."""
    merged: Measured = {}
    for name, value in results[0].items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        merged[name] = statistics.median(result[name] for result in results) if number else value
    return merged


def _start_of_peak() -> int:
    """Forget this process's peak so far; returns the memory that is resident now."""
    with contextlib.suppress(OSError):  # Linux only; elsewhere the peak of the imports is what counts as the start
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    resident = _status("VmRSS")
    return _peak_bytes() if resident is None else resident


def _peak_bytes() -> int:
    """Peak resident memory of this process."""
    # Not ru_maxrss where it can be helped: it starts at what the parent process held.
    highest = _status("VmHWM")
    if highest is not None:
        return highest
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int | None:
    if not STATUS.exists():
        return None
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
