"""VeRA is PEFT's to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

import surgery
from tests.helpers.models import load_base


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("store_bases", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_state_dict_is_bit_equal_to_peft(kind: str, store_bases: bool, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    adapter, _ = surgery.init(folder, "vera", tmp_path / "ours", rank=16, seed=5, store_bases=store_bases)
    config = VeraConfig(
        r=16,
        projection_prng_key=5,
        save_projection=store_bases,
        target_modules=adapter.config["target_modules"],
    )
    stock = get_peft_model(load_base(folder), config)
    expected = get_peft_model_state_dict(stock)
    assert adapter.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(adapter.tensors[name], tensor), name
        assert adapter.tensors[name].dtype == tensor.dtype
    assert ("base_model.vera_A" in adapter.tensors) == store_bases
    # Not saved, the projections are drawn again on load, and are the same.
    loaded = PeftModel.from_pretrained(load_base(folder), tmp_path / "ours")
    for name in ("vera_A", "vera_B"):
        here, there = (getattr(m.base_model, name)["default"] for m in (loaded, stock))
        assert torch.equal(here, there)


def test_saved_like_peft_saves(llama: Path, tmp_path: Path) -> None:
    """A stock folder and ours hold the same configuration keys and tensors."""
    import json

    surgery.init(llama, "vera", tmp_path / "ours", rank=4)
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "ours")
    model.save_pretrained(tmp_path / "stock")
    ours, stock = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "stock"))
    assert ours.keys() == stock.keys()
    stock["target_modules"] = sorted(stock["target_modules"])  # PEFT writes them in the order of a set
    ours["target_modules"] = sorted(ours["target_modules"])
    assert {k: v for k, v in ours.items() if k != "auto_mapping"} == {
        k: v for k, v in stock.items() if k != "auto_mapping"
    }
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "stock")]
    assert len(files[0]) == len(files[1])
