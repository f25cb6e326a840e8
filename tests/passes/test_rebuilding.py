"""Inputs of layers, computed again from what autograd keeps: equal to the true ones, and not held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from surgery.models.sites import linear_sites, select_sites
from surgery.passes import gradients as passes
from surgery.passes import rebuilding
from surgery.passes.gradients import gradients
from surgery.passes.rebuilding import is_rebuildable, rebuild
from tests.helpers.models import build, labelled_inputs
from tests.helpers.reference import own_loss

# Inputs of adapted layers, and how many of them a pass has to hold: those that no gradient reaches, of the first
# block's queries, keys and values.
HELD = {"llama": (21, 3), "gpt2": (8, 1), "vit": (12, 3), "t5": (36, 6)}


@pytest.mark.parametrize("kind", HELD)
def test_inputs_are_rebuilt_and_equal_the_true_ones(kind: str, monkeypatch) -> None:
    model = build(kind)
    sites = select_sites(model)
    true: dict[str, torch.Tensor] = {}
    for site in sites:
        keep = lambda module, args, name=site.module: true.update({name: args[0].detach().clone()})  # noqa: E731
        model.get_submodule(site.module).register_forward_pre_hook(keep)
    seen: dict[str, float] = {}
    asked: list[str] = []
    receive = passes.GradientPass.receive

    def compared(self: Any, name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        seen[name] = float((X.reshape(true[name].shape) - true[name]).abs().max() / true[name].abs().max())
        receive(self, name, D, X)

    rebuilt = passes.GradientPass.rebuilt

    def counted(self: Any, producer: Any) -> torch.Tensor | None:
        asked.append(type(producer).__name__)
        return rebuilt(self, producer)

    monkeypatch.setattr(passes.GradientPass, "receive", compared)
    monkeypatch.setattr(passes.GradientPass, "rebuilt", counted)
    gradients(model, [labelled_inputs(kind)], own_loss, sites, 4)
    layers, held = HELD[kind]
    assert len(seen) == layers
    assert max(seen.values()) <= 1e-5
    assert layers - len(asked) == held


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


WEIGHT, BIAS = torch.linspace(0.5, 1.5, 16), torch.linspace(-1, 1, 16)
STEPS = {
    "layer norm": lambda x: F.layer_norm(x, (16,), WEIGHT, BIAS),
    "layer norm without weight": lambda x: F.layer_norm(x, (16,)),
    "rms norm": lambda x: WEIGHT * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gated": lambda x: F.silu(x) * x.square(),
    "gated by a weight": lambda x: WEIGHT * F.silu(x),
    "reshaped": lambda x: F.gelu(x).reshape(4, 6, 2, 8).transpose(1, 2).reshape(4, 12, 8),
    "from the end": lambda x: F.gelu(x).transpose(-1, -2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", STEPS)
def test_steps_that_are_known(name: str, dtype: torch.dtype) -> None:
    weights = {"WEIGHT": WEIGHT, "BIAS": BIAS}
    x = leaf(4, 6, 16, dtype=dtype)
    for key, value in weights.items():
        globals()[key] = value.to(dtype)
    try:
        y = STEPS[name](x)
    finally:
        globals().update(weights)
    assert is_rebuildable(y)
    again = rebuild(y.grad_fn)
    assert again is not None and again.shape == y.shape and again.dtype == y.dtype
    assert torch.allclose(again, y, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)


def attention(x: torch.Tensor) -> torch.Tensor:
    heads = x.reshape(4, 6, 2, 8).transpose(1, 2)
    result = F.scaled_dot_product_attention(heads, heads, heads)
    return result.transpose(1, 2).reshape(4, 6, 16)


def test_attention_keeps_its_result() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        y = attention(leaf(4, 6, 16))
    assert is_rebuildable(y)
    assert torch.allclose(rebuild(y.grad_fn), y, atol=1e-6)


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = F.gelu(x)
    y[0] = 3.0
    return y


class Named(torch.autograd.Function):
    """Its node has a name that is no function."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.name = "own"
        return x * 2

    @staticmethod
    def backward(ctx: Any, D: torch.Tensor) -> torch.Tensor:
        return D * 2


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x,
        lambda x: x.detach(),
        lambda x: x + 1,
        lambda x: F.dropout(x, 0.5, training=True) + x,
        lambda x: x[:, :3],
        in_place,
        Named.apply,
        lambda x: Named.apply(x).reshape(-1, 16),
    ],
    ids=["leaf", "constant", "sum", "dropout", "part", "changed in place", "own function", "view of own function"],
)
def test_what_is_not_known_is_held(step: Any) -> None:
    assert not is_rebuildable(step(leaf(4, 6, 16)))


def test_wrong_rebuilding_is_noticed(monkeypatch) -> None:
    """Whatever a future version of torch keeps: what does not give the same numbers is not used."""
    y = F.gelu(leaf(4, 6, 16))
    assert is_rebuildable(y)
    for wrong in (lambda node, depth: node._saved_self, lambda node, depth: y.detach()[:2], lambda node, depth: None):
        monkeypatch.setitem(rebuilding._KNOWN, "GeluBackward0", wrong)
        assert not is_rebuildable(y)


def test_nothing_is_rebuilt_under_checkpointing() -> None:
    found: list[bool] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(x)
        found.append(is_rebuildable(y))
        return y.square()

    torch.utils.checkpoint.checkpoint(block, leaf(4, 6, 16), use_reentrant=False).sum().backward()
    assert found == [False, False]


def test_layer_after_layer_without_anything_between() -> None:
    """The second one's input comes from a node of our own."""
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 7))
    found = gradients(model, [leaf(20, 8).detach()], lambda m, x: m(x).square().mean(), linear_sites(model), 3)
    assert set(found.svds) == {"0", "1"}
