"""The picture of a batch, and its row for each member."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.batches import truncate


def test_the_command_prints_a_row_for_each_and_draws(loras: Path, tmp_path: Path) -> None:
    truncate(loras / "c")
    call = [sys.executable, "-m", "surgery", "convert", loras, "--to", "giva", "--ratio", "2", "-o", tmp_path / "out"]
    words = [*map(str, call), "--plot", str(tmp_path / "batch.svg")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    rows = done.stdout.splitlines()
    assert done.returncode == 1 and rows[0].split()[0] == "adapter"
    assert [row.split()[0] for row in rows[1:4]] == ["a", "b", "c"] and "failed: " in rows[3]
    assert rows[-2].startswith("2 done, 1 failed") and rows[-1].startswith("Load it:  ")
    picture = (tmp_path / "batch.svg").read_text()
    assert "2 adapters as giva, 1 failed" in picture and "LORA" in picture
    told = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True, check=False).stdout)
    assert [each["state"] for each in told["adapters"]] == ["skipped", "skipped", "failed"]
