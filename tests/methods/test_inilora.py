"""IniLoRA's start against the exact decomposition, the reference's Adam recipe, and its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import surgery
from surgery.methods.inilora import IniloraConfig
from tests.helpers.models import load_base


def factors(adapter: surgery.Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`B0` and `A0` by module."""
    return {m: (t["inilora_B0"].double(), t["inilora_A0"].double()) for m, t in adapter.modules.items()}


@pytest.mark.parametrize("rank", [8, 32])
def test_captured_energy_on_real_weights(rank: int, model_folder) -> None:
    folder = model_folder("minilm")
    adapter, _ = surgery.init(folder, "inilora", rank=rank)
    base = load_base(folder)
    for module, (B0, A0) in factors(adapter).items():
        W = base.get_submodule(module).weight.detach().double()
        best = torch.linalg.svdvals(W)[:rank].square().sum()
        left = (W - B0 @ A0).square().sum()
        assert float(W.square().sum() - left) >= 0.999 * float(best), module
        # Balanced: both factors carry the square root of the singular values.
        assert torch.allclose(B0.norm(dim=0), A0.norm(dim=1), rtol=1e-4)


def adam_recipe(W: torch.Tensor, rank: int, steps: int) -> float:
    """Squared error that the reference's optimisation reaches."""
    generator = torch.Generator().manual_seed(0)
    std = float(W.std())
    B = (torch.randn(W.shape[0], rank, generator=generator) * std).requires_grad_()
    A = (torch.randn(rank, W.shape[1], generator=generator) * std).requires_grad_()
    optimizer = torch.optim.Adam([A, B], lr=5e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(B @ A, W).backward()
        optimizer.step()
    return float((W - B @ A).detach().square().sum())


def test_error_is_below_the_adam_recipe(model_folder) -> None:
    folder = model_folder("minilm")
    adapter, _ = surgery.init(folder, "inilora", rank=8, target=["layer.0.attention.self.query"])
    module, (B0, A0) = next(iter(factors(adapter).items()))
    W = load_base(folder).get_submodule(module).weight.detach()
    ours = float((W.double() - B0 @ A0).square().sum())
    assert ours < adam_recipe(W, 8, steps=2000)


@pytest.mark.parametrize("method", ["inilora", "inilora-alpha", "inilora-beta"])
def test_scale_and_change_follow_the_definition(method: str, llama: Path, tmp_path: Path) -> None:
    """dW = s (B A - B0 A0), s = alpha / r, in a model that PEFT has loaded."""
    adapter, _ = surgery.init(llama, method, tmp_path / "out", rank=4, alpha=12)
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "out")
    name = "model.layers.1.self_attn.k_proj"
    layer = model.base_model.model.get_submodule(name)
    A, B = layer.inilora_A["default"], layer.inilora_B["default"]
    with torch.no_grad():
        A.add_(0.1)
        B.mul_(1.3)
    B0, A0 = factors(adapter)[name]
    expected = 3.0 * (B.detach().double() @ A.detach().double() - B0 @ A0)
    assert torch.allclose(layer.get_delta_weight("default").double(), expected, atol=1e-5)
    if method == "inilora":
        W = layer.linear.weight.detach().double()
        best = torch.linalg.svdvals(W)[4:].square().sum()
        assert float((W - 3.0 * B0 @ A0).square().sum()) == pytest.approx(float(best), rel=1e-3)


def test_variants_are_seeded_and_distributed_as_published(model_folder) -> None:
    folder = model_folder("minilm")
    target = ["intermediate.dense"]
    for method, std_B, std_A in (("inilora-alpha", 0.5, 0.5), ("inilora-beta", (2 / 32) ** 0.5, (2 / 384) ** 0.5)):
        first, _ = surgery.init(folder, method, rank=32, target=target)
        second, _ = surgery.init(folder, method, rank=32, target=target)
        other, _ = surgery.init(folder, method, rank=32, target=target, seed=1)
        B0, A0 = next(iter(factors(first).values()))
        assert float(B0.std()) == pytest.approx(std_B, rel=0.03)
        assert float(A0.std()) == pytest.approx(std_A, rel=0.03)
        assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
        assert not any(torch.equal(first.tensors[n], other.tensors[n]) for n in first.tensors)


def test_regenerated_variants_depend_on_the_seed_not_the_base(model_folder, tmp_path: Path) -> None:
    """-alpha and -beta without bases open on any weights of the same shape: nothing of theirs comes from the base."""
    from tests.helpers.models import save_model

    surgery.init(model_folder("llama"), "inilora-beta", tmp_path / "out", store_bases=False)
    other = save_model("llama", tmp_path / "other", seed=9)
    PeftModel.from_pretrained(load_base(other), tmp_path / "out")


def test_only_what_is_computed_again_from_weights_depends_on_them(llama: Path) -> None:
    for method, store_bases, depends in (
        ("inilora", False, True),
        ("inilora", True, False),
        ("inilora-alpha", False, False),
        ("inilora-beta", True, False),
    ):
        adapter, _ = surgery.init(llama, method, rank=2, target=["q_proj"], store_bases=store_bases)
        assert bool(adapter.config["base_fingerprint"]) == depends, (method, store_bases)


def test_bad_configurations() -> None:
    for settings, words in (
        ({"r": 0}, "rank"),
        ({"variant": "gamma"}, "variants"),
        ({"lora_alpha": 0.0}, "alpha"),
    ):
        with pytest.raises(surgery.errors.MethodError, match=words):
            IniloraConfig(**settings)
