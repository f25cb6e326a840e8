"""`surgery.push` against a hub on 127.0.0.1, with the real client."""

from __future__ import annotations

from pathlib import Path

import surgery
from tests.hub.loopback import Hub

WEIGHTS = "adapter_model.safetensors"
FILES = {"README.md", "adapter_config.json", WEIGHTS, "layers.png"}


def test_push_makes_a_repository_of_one_commit(hub: Hub, lora: Path) -> None:
    report = surgery.push(lora, "org/small", base_model="bases/llama")
    assert report.out == f"{hub.url}/org/small"
    assert set(hub.files("org/small")) == FILES
    assert hub.files("org/small")[WEIGHTS] == (lora / WEIGHTS).read_bytes()
    assert hub.titles("org/small") == ["LoRA adapter for bases/llama", "initial commit"]
    assert report.created and not report.unchanged and report.private is False
    print(report, hub.requests, hub.files("org/small")["README.md"].decode())
