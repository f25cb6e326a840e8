"""`surgery.train`: the same as a stock Trainer, the rest of the adapter untouched, and nothing lost on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import surgery
from surgery.errors import AdapterError
from surgery.methods.registry import method_names
from surgery.training.preparing import trained_parameters
from tests.helpers.models import load_base
from tests.helpers.training_trained import QUICK


@pytest.mark.parametrize("method", method_names())
def test_every_method(method: str, trained_place: Path, tmp_path: Path) -> None:
    """Trained, written, opened again by PEFT; what does not train is as it was to the last bit."""
    if method == "giva":
        source = surgery.Adapter.open(trained_place / "giva")
    else:
        source, _ = surgery.init(trained_place / "llama", method, tmp_path / "start")
    trains = set(trained_parameters(surgery.trainable(source, trained_place / "llama")))
    out = tmp_path / "out"
    trained, report = surgery.train(
        source, trained_place / "llama", trained_place / "texts.jsonl", out=out, steps=3, batch_size=8, lr=1e-3
    )
    written = surgery.Adapter.open(out)
    assert written.tensors.keys() == source.tensors.keys() and written.config == source.config
    for name, tensor in written.tensors.items():
        assert torch.equal(tensor, trained.tensors[name])
        assert torch.equal(tensor, source.tensors[name]) == (name not in trains), name
    assert (report.method, report.bytes) == (method, (out / "adapter_model.safetensors").stat().st_size)
    model = PeftModel.from_pretrained(load_base(trained_place / "llama"), out).eval()
    ids = torch.arange(4, 20).reshape(2, 8)
    with torch.no_grad():
        moved = (model(input_ids=ids).logits - load_base(trained_place / "llama")(input_ids=ids).logits).abs().max()
    assert moved > 0


def test_an_adapter_of_another_model(trained_place: Path) -> None:
    with pytest.raises(AdapterError):
        surgery.train(trained_place / "giva", trained_place / "bert", trained_place / "classes.jsonl", **QUICK)
