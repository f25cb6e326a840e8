"""What a conversion lost is learnt again in memory."""

from __future__ import annotations

from pathlib import Path

import torch

import surgery
from surgery.passes.examples import read_examples
from surgery.training.preparing import base_for
from surgery.training.recovery import distil
from surgery.training.settings import TrainSettings


def test_recovery_in_memory(packed: Path, taught_place: Path) -> None:
    """What a conversion calls: adapters, base and samples that are there; the head stays as it is."""
    teacher, settings = (
        surgery.Adapter.open(taught_place / "bert-teacher"),
        TrainSettings(max_steps=10, batch_size=8, learning_rate=0.1),
    )
    for source, trained in (
        (packed, {"giva_A", "giva_B", "giva_s"}),
        (taught_place / "bert-start", {"giva_o", "giva_s"}),
    ):
        student = surgery.Adapter.open(source)
        base, _ = base_for(student, taught_place / "bert", None)
        examples = read_examples(taught_place / "texts.jsonl", base, None, labelled=False)
        found = distil(student, teacher, base, examples, settings, torch.device("cpu"))
        assert len(found.loss) == 10
        moved = {
            n.rpartition(".")[2] for n, t in found.adapter.tensors.items() if not torch.equal(t, student.tensors[n])
        }
        assert moved and moved <= trained
