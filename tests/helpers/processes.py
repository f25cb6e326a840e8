"""Several processes that work on one adapter, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch(place: Path, *args: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a Python script in processes that talk to one another."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
