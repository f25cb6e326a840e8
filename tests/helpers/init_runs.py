"""Runs of `surgery init` that must succeed, on a Llama with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from surgery.cli.main import cli
from surgery.methods.registry import method_info
from tests.helpers.command_line import flags, invoke
from tests.helpers.models import save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def texted_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama with a tokenizer; beside it are texts and sentences of three classes."""
    place = tmp_path_factory.mktemp("llama")
    write_rows(place / "texts.jsonl", text_rows(9))
    write_rows(place / "classes.jsonl", text_rows(9, labels=3))
    return save_tokenizer(save_model("llama", place / "model"))


def data_for(method: str, model: Path) -> dict[str, Path]:
    """What a method needs besides the model."""
    return {"data": model.parent / "texts.jsonl"} if method_info(method).reads_gradients else {}


def init(model: Path, method: str, out: Path, *args: Any) -> click.testing.Result:
    """Run `surgery init`, which must succeed."""
    needed = [] if "--data" in str(args) else flags(**data_for(method, model))
    result = invoke("init", model, "--method", method, "-o", out, *needed, *args)
    assert result.exit_code == 0, result.stderr
    return result


def adapter_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def command_named(name: str) -> click.Command:
    with click.Context(cli) as context:
        return cli.get_command(context, name)
