"""vLLM's plugin against modules with the interface of vLLM 0.33 (`vllm.lora.resolver`, `vllm.lora.request`)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import tomllib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from surgery.errors import SurgeryError
from surgery.serving import vllm_plugin
from surgery.serving.store import Store
from tests.helpers.docs_pages import ROOT


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any: ...


@dataclass
class Registry:
    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """vLLM's registry in modules of vLLM's names."""
    made = Registry()
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.resolver", "vllm.lora.request")}
    vars(modules["vllm.lora.resolver"]).update(LoRAResolver=LoRAResolver, LoRAResolverRegistry=made)
    vars(modules["vllm.lora.request"]).update(LoRARequest=LoRARequest)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture
def resolver(registry: Registry, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoRAResolver:
    shutil.copytree(packed, tmp_path / "adapters" / "ada")
    monkeypatch.setenv(vllm_plugin.ADAPTERS, str(tmp_path / "adapters"))
    monkeypatch.setenv(vllm_plugin.CACHE, str(tmp_path / "cache"))
    vllm_plugin.register()
    return registry.resolvers["surgery"]


def asked(resolver: LoRAResolver, base: str, name: str) -> Any:
    return asyncio.run(resolver.resolve_lora(base, name))


def test_vllm_gets_a_request_for_an_expanded_adapter(resolver: LoRAResolver) -> None:
    assert isinstance(resolver, LoRAResolver)
    request = asked(resolver, "org/base", "ada")
    assert request.lora_name == "ada" and request.lora_int_id == Store.id_of("ada")
    assert (Path(request.lora_path) / "adapter_model.safetensors").is_file()
    assert asked(resolver, "org/base", "ada") == request


def test_concurrent_requests(resolver: LoRAResolver) -> None:
    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(resolver.resolve_lora("org/base", "ada") for _ in range(16)))

    assert len({request.lora_path for request in asyncio.run(all_at_once())}) == 1


@pytest.mark.parametrize(
    ("base", "name", "message"),
    [
        ("org/base", "eve", "there is no adapter of this name"),
        ("org/base", "../ada", "is no name of an adapter"),
        ("org/other", "ada", "is for the base model 'org/base', vLLM serves 'org/other'"),
    ],
)
def test_what_is_not_there_is_left_to_other_resolvers(
    base: str, name: str, message: str, resolver: LoRAResolver, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "surgery"):
        assert asked(resolver, base, name) is None
    assert message in caplog.text


def test_what_vllm_was_given_is_not_removed_at_once(
    registry: Registry,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ada", "bob", "cy"):
        shutil.copytree(packed, tmp_path / "adapters" / name)
    size = sum(path.stat().st_size for path in Store(tmp_path / "adapters", tmp_path / "one").get("ada").iterdir())
    monkeypatch.setenv(vllm_plugin.ADAPTERS, str(tmp_path / "adapters"))
    monkeypatch.setenv(vllm_plugin.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(vllm_plugin.LARGEST, str(size + 100))
    monkeypatch.setattr(vllm_plugin, "KEPT", 2)
    vllm_plugin.register()
    paths = [Path(asked(registry.resolvers["surgery"], "org/base", name).lora_path) for name in ("ada", "bob", "cy")]
    assert paths[1].is_dir() and paths[2].is_dir()


def test_nothing_happens_without_a_store(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_plugin.ADAPTERS, raising=False)
    vllm_plugin.register()
    assert not registry.resolvers


def test_a_store_that_is_not_there_is_a_named_error(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vllm_plugin.ADAPTERS, "/no/such/folder")
    with pytest.raises(SurgeryError, match="no such folder of adapters"):
        vllm_plugin.register()


def test_the_entry_point_is_in_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"surgery": "surgery.serving.vllm_plugin:register"}


@pytest.mark.skipif("SURGERY_VLLM" not in os.environ, reason="make servers unpacks vLLM and sets SURGERY_VLLM")
def test_vllms_own_registry_and_requests(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "adapters" / "ada")
    places = {vllm_plugin.ADAPTERS: str(tmp_path / "adapters"), vllm_plugin.CACHE: str(tmp_path / "cache")}
    script = ROOT / "tests" / "helpers" / "readers" / "vllm_resolver.py"
    command = [sys.executable, str(script), os.environ["SURGERY_VLLM"], "org/base", "ada", "../ada"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **places})
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["../ada"] is None and found["ada"][:2] == ["ada", Store.id_of("ada")]
    assert (Path(found["ada"][2]) / "adapter_model.safetensors").is_file()
