"""Measuring a piece of work in a process of its own: seconds, and peak memory above what its imports take."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Measured", "in_process", "measured", "peak_bytes"]

ROOT = Path(__file__).resolve().parents[1]
Measured = dict[str, Any]


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def measured(work: Callable[[], dict[str, Any] | None]) -> Measured:
    """Run `work` once; returns `seconds`, `bytes` (peak above the start), and what the work returned."""
    before = peak_bytes()
    started = time.perf_counter()
    extra = work() or {}
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": peak_bytes() - before, **extra}


def in_process(script: Path, *arguments: str, threads: int | None = None) -> Measured:
    """Run a script that prints one JSON object as its last line, in a fresh process.

    Returns:
        The object, with `process_seconds` for the whole process.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(script), *arguments], check=False, capture_output=True, text=True, env=environment
    )
    if result.returncode:
        raise RuntimeError(f"{script.name} {' '.join(arguments)} failed:\n{result.stderr[-3000:]}")
    value: Measured = json.loads(result.stdout.strip().splitlines()[-1])
    value["process_seconds"] = time.perf_counter() - started
    return value
