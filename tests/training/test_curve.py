"""The loss curve: a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import surgery
from tests.helpers.command_line import contents
from tests.helpers.training_trained import LR, QUICK, STEPS


def test_the_loss_curve(trained_place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, report = surgery.train(
        trained_place / "giva", trained_place / "llama", trained_place / "texts.jsonl", out=out, **QUICK
    )
    rows = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    assert rows == report.loss and [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["learning_rate"] == LR and (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert set(contents(out)) == {
        "adapter_config.json", "adapter_model.safetensors", "loss.jsonl", "loss.png", "surgery.json"
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [out]
    history = json.loads((out / "surgery.json").read_text())
    assert history["command"] == "train" and str(tmp_path) not in json.dumps(history)
