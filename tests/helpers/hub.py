"""A hub on 127.0.0.1, this process as its client, and no way to any other machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_api

import surgery
from tests.helpers.guard import sitecustomize
from tests.helpers.loopback import OWNER, Hub
from tests.helpers.models import load_base, start_options

ROOT = Path(__file__).parents[2]
KINDS = {
    "vera": {"rank": 8},
    "giva": {"rank": 4},
    "inilora": {"rank": 4},
    "frod": {},
    "smoa": {"rank": 4},
}


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket leads off this machine."""
    for owner, attribute, checked in sitecustomize.guards():
        monkeypatch.setattr(owner, attribute, checked)


@pytest.fixture(scope="session")
def running() -> Iterator[Hub]:
    """The hub of this session."""
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(running: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The hub, empty, with this process as its client, logged in as ada."""
    running.clear()
    home = tmp_path / "hf-home"
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # These are read when the library is imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", running.url)
    return running


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are not waited."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def fill(folder: Path, seed: int = 0) -> None:
    """Give every floating-point tensor of an adapter small random values: the change is no longer zero."""
    adapter = surgery.Adapter.open(folder)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in adapter.tensors.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.02
            adapter.tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    adapter.save(folder, force=True)


def make_adapter(method: str, model: Path, out: Path, **options: Any) -> Path:
    """An adapter of a method, trained a little; `lora` is PEFT's own, with PEFT's card."""
    if method == "lora":
        import peft

        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(load_base(model), config).save_pretrained(out)
    else:
        settings = {**KINDS[method], **start_options(method, "llama"), **options}
        surgery.init(model, method, out, **settings)
    fill(out)
    return out


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Path:
    """A trained LoRA, as PEFT saves it: the base model is a path."""
    return make_adapter("lora", llama, tmp_path / "small")


@pytest.fixture
def fresh(running: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in a process that knows the hub by `HF_ENDPOINT` alone."""

    def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = {
            **kept,
            "HF_ENDPOINT": running.url,
            "HF_HOME": str(tmp_path / "hf-home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": f"{ROOT / 'tests' / 'hub' / 'guard'}{os.pathsep}{ROOT}",
            # For what does not go through Python's sockets.
            "https_proxy": "http://127.0.0.1:9",
            "http_proxy": "http://127.0.0.1:9",
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        return subprocess.run(
            [sys.executable, *command], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    return run
