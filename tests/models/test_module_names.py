"""Names of other versions and classes of a model lead to its own."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from surgery.models.module_names import ModelNames
from tests.architectures.specimens import SPECIMENS


def _names(kind: str) -> ModelNames:
    cls, config, settings = SPECIMENS[kind]
    with torch.device("meta"):
        return ModelNames(getattr(tf, cls)(getattr(tf, config)(**settings)))


@pytest.mark.parametrize(
    ("kind", "name", "found"),
    [
        ("llava", "language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("llava", "model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("llava", "model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("qwen2", "model.language_model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("qwen2", "language_model.model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("qwen2", "layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("qwen2", "model.visual.layers.1.mlp.up_proj", None),
        ("qwen2", "model.layers.7.mlp.up_proj", None),
        ("qwen3_5", "model.layers.1.self_attn.q_proj", "model.language_model.layers.1.self_attn.q_proj"),
    ],
)
def test_located(kind: str, name: str, found: str | None) -> None:
    names = _names(kind)
    assert names.located(name, names.modules) == found


def test_an_expert_is_a_part_of_the_joined_parameter() -> None:
    names = _names("mixtral")
    part = names.fused_part("model.layers.1.block_sparse_moe.experts.3.w3.weight")
    assert part is not None and part.target == "model.layers.1.mlp.experts.gate_up_proj"
    (origin,) = [index for key, index in names.origins(part).items() if names.same_key(key, part.key)]
    gate_up = torch.arange(names.parameters[part.target].numel()).reshape(names.parameters[part.target].shape)
    assert torch.equal(origin, gate_up[3, 48:])


def test_a_module_of_any_other_kind_has_its_names() -> None:
    names = ModelNames(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert names.located("0", names.modules) == "0" and names.located("1", names.modules) is None
