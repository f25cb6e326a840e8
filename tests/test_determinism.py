"""The same input and options give the same bytes, in another process too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

import surgery
from surgery.methods.registry import method_infos
from tests.helpers.command_line import contents
from tests.helpers.conversions import trained
from tests.helpers.models import load_base, save_model

ROOT = Path(__file__).parents[1]
METHODS = tuple(info.name for info in method_infos() if not info.reads_gradients)
CONVERSIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "giva": {},
    "vera": {"rank": 24, "accept_loss": True},
    "frod": {"base": "model", "accept_loss": True},
    "smoa": {"base": "model", "accept_loss": True},
}
SCRIPT = """
import sys, torch
from tests.test_determinism import all_runs
torch.set_num_threads(1)
for name, run in all_runs().items():
    run(f"{sys.argv[1]}/{name}")
"""


def all_runs() -> dict[str, Callable[[str], Any]]:
    """Name -> what writes a folder, from what lies in the working directory."""
    runs: dict[str, Callable[[str], Any]] = {}
    for method in METHODS:
        runs[f"init-{method}"] = lambda out, method=method: surgery.init("model", method, out)
    for to, options in CONVERSIONS.items():
        runs[f"convert-{to}"] = lambda out, to=to, options=options: surgery.convert("lora", to, out, **options)
    runs["merge"] = lambda out: surgery.merge("lora", "model", out)
    return runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a LoRA of it, and everything made of them in another process, whose sets are in another order."""
    folder = tmp_path_factory.mktemp("determinism")
    save_model("llama", folder / "model")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trained(load_base(folder / "model"), config, folder / "lora")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", SCRIPT, "elsewhere"], cwd=folder, env=environment, check=True)
    return folder


@pytest.mark.parametrize("name", all_runs())
def test_same_bytes(name: str, place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    all_runs()[name](str(tmp_path / "here"))
    assert contents(tmp_path / "here") == contents(place / "elsewhere" / name)


def test_control_another_seed_is_seen(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    surgery.init("model", "inilora-alpha", tmp_path / "here", seed=1)
    here, elsewhere = contents(tmp_path / "here"), contents(place / "elsewhere" / "init-inilora-alpha")
    assert here.keys() == elsewhere.keys()
    assert here["adapter_model.safetensors"] != elsewhere["adapter_model.safetensors"]
    provenance = json.loads(elsewhere["surgery.json"] or b"")
    assert provenance["options"]["seed"] == 0
