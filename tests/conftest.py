"""Shared fixtures. Nothing here or in the tests uses the network."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before any Hugging Face library is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Copies of the tests' data files do not stay.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="surgery-tests-")

import pytest
import torch
import transformers

from tests.helpers.bad_input import learner, model  # noqa: F401
from tests.helpers.calls import calls_place  # noqa: F401
from tests.helpers.models import minilm_folder, save_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
# Two workers share the machine; one thread each is faster than two that contend.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory):
    """Function from a kind of model to a folder that holds it, made once."""
    made: dict[str, Path] = {"minilm": minilm_folder()}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_model(kind, tmp_path_factory.mktemp(kind) / "model")
        return made[kind]

    return folder


@pytest.fixture
def llama(model_folder) -> Path:
    """Folder of the tiny grouped-query Llama."""
    return model_folder("llama")
