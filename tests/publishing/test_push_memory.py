"""Memory of a push does not grow with the adapter."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.push import LIMIT, PART, made
from tests.helpers.hub import ROOT
from tests.helpers.loopback import OWNER, Hub


def test_200_megabytes(hub: Hub, tmp_path: Path, fresh) -> None:
    """Checked, drawn, hashed and sent, in parts, with less than 150 MB above the imports."""
    folder = made(tmp_path / "adapter", 200)
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size > 199e6
    hub.part_size = PART
    result = fresh(str(ROOT / "benchmarks" / "push.py"), "--worker", str(folder), "push", HF_TOKEN=OWNER)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["bytes"] < LIMIT
    assert set(hub.files("org/large")) == {"README.md", "adapter_config.json", weights.name, "layers.png"}
    assert hub.files("org/large")[weights.name] == weights.read_bytes()
    assert hub.count(r"PUT /store/\w+/\d+$") == -(-weights.stat().st_size // PART)
