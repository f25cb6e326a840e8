"""Adapters that earlier versions wrote are still read, by us and by PEFT; those of later versions are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaForCausalLM

import surgery
from surgery.adapters.adapter import Adapter
from surgery.errors import AdapterError
from surgery.storage.format_version import FORMAT_VERSION
from tests.compat.stored import EXAMPLES, LARGEST, base_in, changes, examples, sums, unfolded

ALL = [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in examples()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_in(tmp_path_factory.mktemp("stored") / "base")


def test_every_version_and_kind_has_an_example() -> None:
    assert {path.parent.name for path in examples()} == {f"v{n}" for n in range(1, FORMAT_VERSION + 1)}
    kinds = {json.loads(path.read_text())["adapter_config.json"]["peft_type"] for path in examples()}
    assert kinds == {"VERA", "GIVA", "INILORA", "FROD_PORTABLE", "SMOA", "LORA"}
    assert all(path.stat().st_size <= LARGEST for path in examples())


@pytest.mark.parametrize("example", ALL)
def test_an_example_changes_what_it_changed(example: Path, base: Path, tmp_path: Path) -> None:
    expected = unfolded(example, tmp_path / "adapter")
    found = changes(tmp_path / "adapter", base)
    assert found.keys() == expected.keys()
    for module, wanted in expected.items():
        assert found[module] == pytest.approx(wanted, rel=1e-4, abs=1e-5) and wanted[1] > 1e-6


@pytest.mark.parametrize("example", ALL)
def test_an_example_opens_in_peft(example: Path, base: Path, tmp_path: Path) -> None:
    expected = unfolded(example, tmp_path / "adapter")
    model = surgery.load(tmp_path / "adapter", base)
    layers = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        change = layer.get_delta_weight("default")
        change = change if getattr(layer, "site", None) is None else layer.site.matrix(change)
        assert sums(change) == pytest.approx(expected[name], rel=1e-4, abs=1e-5)
    plain = LlamaForCausalLM.from_pretrained(base).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert not torch.equal(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["adapter_config.json", "surgery.json"])
@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, "1", None, 0])
def test_another_format_version_is_refused_by_name(name: str, version: object, base: Path, tmp_path: Path) -> None:
    unfolded(EXAMPLES / "v1" / "giva-codes.json", tmp_path / "adapter")
    path = tmp_path / "adapter" / name
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "format_version": version}))
    with pytest.raises(AdapterError, match=rf"{name}: .*format version.*up to {FORMAT_VERSION}"):
        Adapter.open(tmp_path / "adapter")
    # A control: the version that was there is read.
    path.write_text(json.dumps(stored))
    Adapter.open(tmp_path / "adapter")
