"""Parameters are found under the names of the files, as transformers itself loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery.models.checkpoint_names import parameter_sources
from tests.helpers.models import load_base


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "mixtral"])
def test_every_parameter_is_what_transformers_loads(kind: str, model_folder) -> None:
    folder: Path = model_folder(kind)
    tensors, model = load_file(folder / "model.safetensors"), load_base(folder)
    sources = parameter_sources(model, tensors)
    state = model.state_dict()
    assert set(sources) >= {name for name, _ in model.named_parameters()}
    for name in sources:
        torch.testing.assert_close(sources[name].read(name, model, tensors.__getitem__), state[name], rtol=0, atol=0)


def test_a_tensor_without_a_place_is_left_out(llama: Path) -> None:
    model = load_base(llama)
    assert "extra.weight" not in parameter_sources(model, [*load_file(llama / "model.safetensors"), "extra.weight"])
