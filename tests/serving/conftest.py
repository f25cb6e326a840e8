"""A packed adapter to serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import surgery
from tests.helpers.adapters import make_adapter
from tests.helpers.exports import lora
from tests.helpers.hub import hub, running, waits  # noqa: F401
from tests.helpers.stores import store  # noqa: F401


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, model_folder) -> Path:
    """A packed adapter, whose configuration names its base as a server would."""
    folder = tmp_path_factory.mktemp("packed")
    base = model_folder("llama")
    make_adapter(base, folder / "lora", lora())
    surgery.convert(folder / "lora", "giva", folder / "giva", rank=4, bits=8)
    edit(folder / "giva", base_model_name_or_path="org/base")
    return folder / "giva"


def edit(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
