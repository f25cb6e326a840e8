"""`adapter_model.bin`: tensors are read, code is never run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.errors import AdapterError
from tests.helpers.models import load_base, model_inputs, output
from tests.helpers.stock_adapters import saved


@pytest.fixture
def pickled(llama: Path, tmp_path: Path) -> Path:
    """A LoRA as PEFT saved it before it wrote safetensors."""
    import peft

    saved(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "lora" / "adapter_model.bin")
    return tmp_path / "lora"


def test_a_pickle_of_tensors_is_the_same_adapter(pickled: Path, llama: Path, tmp_path: Path) -> None:
    whole = surgery.Adapter.open(pickled)
    (pickled / "adapter_model.safetensors").unlink()
    adapter = surgery.Adapter.open(pickled)
    assert adapter.same_as(whole) and "without running code" in adapter.notes[0]
    inputs = model_inputs("llama")
    with torch.no_grad():
        want = output(surgery.load(whole, load_base(llama)).eval(), inputs)
        assert torch.equal(output(surgery.load(pickled, load_base(llama)).eval(), inputs), want)
    assert surgery.inspect(pickled).bytes == (pickled / "adapter_model.bin").stat().st_size
    made, _ = surgery.convert(pickled, "lora", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("adapter_model*")) == ["adapter_model.safetensors"]
    assert made.delta("model.layers.0.self_attn.q_proj").shape == (32, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not tensors by name"),
        ({"lora_A": 3}, "lora_A is a int, not a tensor"),
        ({1: torch.ones(2)}, "not tensors by name"),
        (b"broken", "cannot be read"),
    ],
)
def test_what_holds_no_tensors_is_refused(content: object, message: str, pickled: Path) -> None:
    (pickled / "adapter_model.safetensors").unlink()
    path = pickled / "adapter_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(AdapterError, match=message):
        surgery.Adapter.open(pickled)


def test_safetensors_win_over_a_pickle_beside_them(pickled: Path) -> None:
    (pickled / "adapter_model.bin").write_bytes(b"never opened")
    assert surgery.Adapter.open(pickled).as_stored
