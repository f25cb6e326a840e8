"""Models that are given as objects: any kind, with their heads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import surgery
from surgery.errors import CheckpointError
from tests.helpers.gradient_starts import bases
from tests.helpers.models import build, labelled_inputs


def test_live_model_of_any_kind(tmp_path: Path) -> None:
    """No transformers model, batches that are tuples, a loss of one's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    batches = [(torch.randn(9, 12), torch.randint(0, 4, (9,))) for _ in range(2)]
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    adapter, report = surgery.init(model, "giva", tmp_path / "out", data=iter(batches), loss=loss, target=["0", "2"])
    assert report.notes == ["rank 8 is capped at min(in, out) in 1 of 2 layers (down to 4)"]
    assert report.samples is None
    assert report.loss == pytest.approx(sum(float(loss(model, batch).detach()) for batch in batches) / 2)
    assert adapter.modules["0"]["giva_A"].shape == (8, 12)
    from peft import PeftModel

    x = torch.randn(3, 12)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")(x), model(x))


def test_live_classifier_brings_its_head(model_folder, tmp_path: Path) -> None:
    """A head that was drawn anew is in no file but the adapter's."""
    torch.manual_seed(5)
    model = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=4)
    batch = {**labelled_inputs("bert"), "labels": torch.tensor([0, 3, 1, 2])}
    adapter, report = surgery.init(model, "giva", tmp_path / "out", data=[batch])
    assert (adapter.config["task_type"], adapter.config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert torch.equal(adapter.modules["classifier"]["weight"], model.classifier.weight)
    assert report.notes == []
    # And surgery.load gives the bare checkpoint a head of that size.
    loaded = surgery.load(tmp_path / "out", model_folder("bert"))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, model.eval()(**inputs).logits, atol=1e-6)


def test_unknown_task_of_a_live_model() -> None:
    with pytest.raises(CheckpointError, match="unknown task 'nope'"):
        bases(build("llama"), task="nope")
