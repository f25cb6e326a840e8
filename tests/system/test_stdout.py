"""What compiled code prints does not end up in a command's output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import surgery
from tests.helpers.models import save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows


def test_settings_that_tokenizers_does_not_know_are_not_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_tokenizer(save_model("llama", tmp_path / "llama"))
    path = model / "tokenizer.json"
    settings = json.loads(path.read_text())
    for token in settings["added_tokens"]:
        token["\x1b[2J\x07"] = {"a": 1}
    path.write_text(json.dumps(settings))
    write_rows(tmp_path / "texts.jsonl", text_rows(4))
    surgery.init(model, "giva", tmp_path / "out", data=tmp_path / "texts.jsonl", rank=2)
    print("and what comes afterwards is there again", flush=True)
    assert capfd.readouterr().out == "and what comes afterwards is there again\n"
