"""A training that is stopped, and the one in one go."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

import surgery
from surgery.training.interruption import TrainingInterrupted
from tests.helpers.models import save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

STEPS = 60
OPTIONS = {"steps": STEPS, "batch_size": 8, "lr": 3e-3, "save_every": 10, "seed": 5}


@pytest.fixture(scope="session")
def begun_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with dropout, an adapter that starts well, data, and what a training of it comes to."""
    folder = tmp_path_factory.mktemp("resume")
    save_tokenizer(save_model("bert", folder / "bert"))
    write_rows(folder / "data.jsonl", text_rows(48, labels=3))
    surgery.init(folder / "bert", "giva", folder / "start", task="seq-cls", data=folder / "data.jsonl", rank=2)
    surgery.train(folder / "start", folder / "bert", folder / "data.jsonl", out=folder / "whole", **OPTIONS)
    return folder


def assert_same_end(out: Path, begun_place: Path) -> None:
    """The loss to 1e-4, as asked for; on one machine, to the last bit."""
    whole, found = (
        [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
        for folder in (begun_place / "whole", out)
    )
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert found[-1]["loss"] == pytest.approx(whole[-1]["loss"], abs=1e-4)
    expected, tensors = (surgery.Adapter.open(folder).tensors for folder in (begun_place / "whole", out))
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-6)


def stopped(begun_place: Path, out: Path, at: int) -> TrainingInterrupted:
    """A training in this process that is interrupted after a step."""

    def stop(step: int, steps: int, what: str) -> None:
        if step == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingInterrupted) as caught:
        surgery.train(
            begun_place / "start", begun_place / "bert", begun_place / "data.jsonl", out=out, progress=stop, **OPTIONS
        )
    return caught.value
