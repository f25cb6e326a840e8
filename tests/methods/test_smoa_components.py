"""SMoA's variant `components` against its definition, and against PEFT's HiRA for one group."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft import HiraConfig, PeftModel, get_peft_model

import surgery
from surgery.methods.smoa import split_rank
from tests.helpers.models import load_base, model_inputs, output, relative_difference


def trained(folder: Path, out: Path, **options):
    """A loaded adapter whose factors have moved."""
    adapter, _ = surgery.init(folder, "smoa", out, variant="components", **options)
    model = PeftModel.from_pretrained(load_base(folder), out, is_trainable=True).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter, model


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_change_follows_the_definition(groups: int, llama: Path, tmp_path: Path) -> None:
    adapter, model = trained(llama, tmp_path / "out", rank=7, groups=groups)
    for name in ("model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj"):
        layer = model.base_model.model.get_submodule(name)
        W = layer.linear.weight.detach().double()
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        share = sigma.cumsum(0) / sigma.sum()
        edges = [0, *[int((share < k / groups).sum()) + 1 for k in range(1, groups)], len(sigma)]
        assert adapter.modules[name]["smoa_cuts"].tolist() == edges[1:-1]
        A, B = layer.smoa_A["default"].detach().double(), layer.smoa_B["default"].detach().double()
        start, expected = 0, torch.zeros_like(W)
        for (low, high), rank in zip(itertools.pairwise(edges), split_rank(7, groups), strict=True):
            mask = (U[:, low:high] * sigma[low:high]) @ Vh[low:high]
            expected += mask * (B[:, start : start + rank] @ A[start : start + rank])
            start += rank
        assert torch.allclose(layer.get_delta_weight("default").double(), expected, atol=1e-5)


def test_one_group_is_hira(llama: Path, tmp_path: Path) -> None:
    adapter, model = trained(llama, tmp_path / "out", rank=4, groups=1)
    hira = get_peft_model(load_base(llama), HiraConfig(r=4, target_modules=adapter.config["target_modules"])).eval()
    with torch.no_grad():
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "smoa_A"):
                twin = hira.base_model.model.get_submodule(name)
                twin.hira_A["default"].copy_(module.smoa_A["default"])
                twin.hira_B["default"].copy_(module.smoa_B["default"])
        inputs = model_inputs("llama")
        ours, theirs, base = output(model, inputs), output(hira, inputs), output(load_base(llama), inputs)
    assert relative_difference(ours, theirs) < 1e-5
    assert relative_difference(theirs, base) > 1e-2


def test_trainable_count_is_that_of_a_lora_and_the_change_is_not_low_rank(llama: Path, tmp_path: Path) -> None:
    _, model = trained(llama, tmp_path / "out", rank=4, groups=2, target=["q_proj"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 4 * (32 + 32)
    layer = model.base_model.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert int(torch.linalg.matrix_rank(layer.get_delta_weight("default"))) > 4


def test_the_start_is_as_wide_as_a_linear_layers_own(llama: Path) -> None:
    """A uniform in +-1 / sqrt(in), B zero."""
    adapter, _ = surgery.init(llama, "smoa", variant="components", rank=16, target=["q_proj", "down_proj"])
    for tensors in adapter.modules.values():
        A, bound = tensors["smoa_A"], tensors["smoa_A"].shape[1] ** -0.5
        assert 0.95 * bound < float(A.abs().max()) <= bound and not tensors["smoa_B"].any()
        assert float(A.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_split_rank() -> None:
    assert split_rank(7, 3) == [3, 2, 2]
    assert split_rank(32, 2) == [16, 16]
