"""Contents of an adapter: tensors that change, errors that name the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from surgery.adapters.names import MODEL_PREFIX
from surgery.errors import AdapterError
from tests.helpers.weight_changes import many_layers


def test_what_cannot_be_said_is_refused(llama: Path) -> None:
    adapter, _ = surgery.init(llama, "frod", target=["q_proj"])
    name = "model.layers.1.self_attn.q_proj"
    with pytest.raises(AdapterError, match="needs the base weight"):
        adapter.delta(name)
    with pytest.raises(AdapterError, match="no module 'nowhere'"):
        adapter.delta("nowhere")
    with pytest.raises(AdapterError, match="how wide"):
        surgery.init(llama, "vera", target=["q_proj"])[0].delta(name)
    for method in ("vera", "inilora"):
        bare, _ = surgery.init(llama, method, target=["q_proj"], store_bases=False)
        with pytest.raises(AdapterError, match=r"surgery\.load"):
            bare.delta(name)


def test_errors_call_an_adapter_by_its_folder(llama: Path, tmp_path: Path) -> None:
    made, _ = surgery.init(llama, "vera", target=["q_proj"])
    made.save(tmp_path / "out")
    assert made.label == "the adapter" and surgery.Adapter.open(tmp_path / "out").label == str(tmp_path / "out")


def test_tensors_that_a_caller_changes_are_seen() -> None:
    adapter = many_layers(3)
    assert float(adapter.delta("blocks.1.fc").dense()[0, 0]) == 2 * 2 * 2
    first = f"{MODEL_PREFIX}blocks.1.fc.lora_A.weight"
    adapter.tensors[first] = torch.full((1, 3), 7.0)
    assert float(adapter.delta("blocks.1.fc").dense()[0, 0]) == 7 * 2 * 2
    adapter.tensors[first] = torch.full((1, 3), float("nan"))
    with pytest.raises(AdapterError, match="NaN"):
        adapter.delta("blocks.1.fc")
    # As many tensors as before, under other names.
    adapter.tensors[f"{MODEL_PREFIX}blocks.1.fc.lora_magnitude_vector"] = adapter.tensors.pop(first)
    with pytest.raises(AdapterError, match="DoRA"):
        adapter.delta("blocks.1.fc")
    adapter.tensors = {name: t for name, t in adapter.tensors.items() if ".1." not in name}
    assert set(adapter.modules) == {"blocks.0.fc", "blocks.2.fc"}
    with pytest.raises(AdapterError, match="no module"):
        adapter.delta("blocks.1.fc")
