"""One pass over data: the gradient's leading vectors, and that no weight's gradient is held on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from surgery.errors import MethodError
from surgery.models.sites import Site, select_sites, site_of
from surgery.passes import gradients as passes
from surgery.passes.gradients import gradients
from tests.helpers.models import build, labelled_inputs
from tests.helpers.reference import angle, own_loss, spectrum, true_gradients

KINDS = ("llama", "gpt2", "t5", "vit")


def linears(model: nn.Module) -> list[Site]:
    return [site_of(model, name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def check(model: Any, batches: list[Any], loss: Callable[..., torch.Tensor], sites: list[Site], rank: int = 8) -> None:
    """Every site's vectors against the true gradient of the summed losses."""
    found = gradients(model, batches, loss, sites, rank)
    expected = true_gradients(model, batches, loss, sites)
    reached = {module for module, G in expected.items() if float(G.abs().max()) > 0}
    assert set(found.svds) == reached
    assert set(found.absent) == {site.module for site in sites} - reached
    for module, (svd,) in found.svds.items():
        true = spectrum(expected[module])
        assert true.captured_by(svd.Vh) >= 0.995, module
        # Between batches what is small is cut off.
        close = 1e-5 if len(batches) == 1 else 1e-3
        assert torch.allclose(svd.S.double(), true.S[: len(svd.S)], rtol=1e-3, atol=close * float(true.S[0])), module


# Several batches


def in_batches(batch: dict[str, torch.Tensor], sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    """One batch cut into several, with each one's share of the mean over all tokens with a label."""
    result = []
    start = 0
    total = items(batch["labels"])
    for size in sizes:
        part = {name: value[start : start + size] for name, value in batch.items()}
        result.append({**part, "share": items(part["labels"]) / total})
        start += size
    return result


def items(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != -100).sum()) if labels.ndim == 2 else len(labels)


def shared_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    share = batch["share"]
    return own_loss(model, {name: value for name, value in batch.items() if name != "share"}) * share


@pytest.mark.parametrize("sizes", [[16], [4, 4, 4, 4], [1, 9, 6], [1] * 16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_several_batches_come_to_the_gradient_of_all(kind: str, sizes: list[int]) -> None:
    """Samples of unequal length: the mean over all items does not depend on how they are cut into batches."""
    model = build(kind)
    sites = select_sites(model)
    batch = labelled_inputs(kind, 16)
    found = gradients(model, in_batches(batch, sizes), shared_loss, sites, 4)
    expected = true_gradients(model, [batch], own_loss, sites)
    assert found.batches == len(sizes)
    with torch.no_grad():
        assert found.loss == pytest.approx(float(own_loss(model, batch)), rel=1e-5)
    for site in sites:
        assert spectrum(expected[site.module]).captured_by(found.svds[site.module][0].Vh) >= 0.99, site.module


def test_control_first_batch_alone_captures_less() -> None:
    model = build("llama")
    sites = select_sites(model)
    batch = labelled_inputs("llama", 16)
    found = gradients(model, in_batches(batch, [2, 14])[:1], shared_loss, sites, 4)
    expected = true_gradients(model, [batch], own_loss, sites)
    shares = [spectrum(expected[m]).captured_by(svd.Vh) for m, (svd,) in found.svds.items()]
    assert sum(shares) / len(shares) < 0.9


def test_many_batches_on_a_wide_layer() -> None:
    """Between batches the sum is cut; on a layer too wide to be kept whole this must not lose what comes late."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400))
    # A falling spectrum, drawn anew for every batch.
    scales = torch.arange(1, 301) ** -0.5
    batches = [(torch.randn(60, 300) * scales, torch.randn(60, 400) + torch.randn(400)) for _ in range(8)]
    loss = lambda model, batch: F.mse_loss(model(batch[0]), batch[1], reduction="sum")  # noqa: E731
    site = site_of(model, "0", model[0])
    found = gradients(model, batches, loss, [site], 8)
    W, b = model[0].weight.double(), model[0].bias.double()
    G = sum(2 * (x.double() @ W.T + b - y.double()).T @ x.double() for x, y in batches).detach()
    assert spectrum(G).captured_by(found.svds["0"][0].Vh) >= 0.99


# What is held


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_gets_a_gradient_and_the_model_is_left_as_it_was(kind: str, trainable: bool, monkeypatch) -> None:
    model = build(kind).requires_grad_(trainable)
    next(model.parameters()).requires_grad_(not trainable)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    wanted_gradient: list[str] = []
    reduce = passes.GradientPass._reduce

    def looked_at(self: Any, name: str) -> None:
        wanted_gradient.extend(n for n, p in model.named_parameters() if p.requires_grad or p.grad is not None)
        reduce(self, name)

    monkeypatch.setattr(passes.GradientPass, "_reduce", looked_at)
    found = gradients(model, [labelled_inputs(kind)], own_loss, select_sites(model), 4)
    assert found.svds and not wanted_gradient
    assert all(parameter.grad is None for parameter in model.parameters())
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert hooks == {name: len(module._forward_hooks) for name, module in model.named_modules()}


def test_model_is_left_as_it_was_after_an_error() -> None:
    model = build("llama")

    def fails(model: Any, batch: Any) -> torch.Tensor:
        own_loss(model, batch)
        raise KeyError("labels")

    with pytest.raises(KeyError):
        gradients(model, [labelled_inputs("llama")], fails, select_sites(model), 4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture
def formed(monkeypatch) -> Iterator[list[int]]:
    """How many gradients are alive whenever one is formed."""
    import gc

    counts: list[int] = []
    dense = passes.TokenProduct.dense

    def counted(self: passes.TokenProduct) -> torch.Tensor:
        result = dense(self)
        gc.collect()
        shapes = {self.shape, self.shape[::-1]}
        alive = [
            each
            for each in gc.get_objects()
            if isinstance(each, torch.Tensor) and tuple(each.shape) in shapes and not isinstance(each, nn.Parameter)
        ]
        counts.append(len({each.data_ptr() for each in alive}))
        return result

    monkeypatch.setattr(passes.TokenProduct, "dense", counted)
    yield counts


class Deep(nn.Module):
    """Many layers of one shape that nothing else in a pass has."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(37, 37) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_one_gradient_is_alive_at_a_time(formed: list[int]) -> None:
    model = Deep()
    x = torch.randn(200, 37, generator=torch.Generator().manual_seed(0))
    gradients(model, [x, x], lambda model, x: model(x).square().mean(), linears(model), 4)
    assert len(formed) == 6 and set(formed) == {1}


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_inputs_and_gradients_are_let_go_layer_by_layer(reentrant: bool | None, monkeypatch) -> None:
    """Also under checkpointing, where layers run again while the backward pass is under way."""
    pending: list[int] = []
    receive = passes.GradientPass.receive

    def counted(self: Any, name: str, D: torch.Tensor, X: torch.Tensor) -> None:
        receive(self, name, D, X)
        pending.append(len(self._pairs))

    monkeypatch.setattr(passes.GradientPass, "receive", counted)
    model = Blocks(reentrant)
    gradients(model, [torch.randn(50, 16) for _ in range(2)], square, linears(model), 4)
    assert pending == [0] * 12


# Which layers, and how often


class Twice(nn.Module):
    """A layer that is called twice, some that get no gradient for one reason or another, one called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(12, 12), nn.Linear(12, 5)
        self.unused, self.lost, self.frozen, self.silenced = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        h = torch.tanh(self.shared(x))
        self.lost(h)
        h = torch.tanh(self.shared(h)) + 0 * self.silenced(h)
        return self.last(input=h)


def square(model: Any, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - 1).square().mean()


def test_shared_layer_and_layers_without_a_gradient() -> None:
    torch.manual_seed(0)
    model = Twice()
    x = torch.randn(30, 12)
    check(model, [x], square, linears(model), 4)
    found = gradients(model, [x], square, linears(model), 4)
    assert found.absent == ["unused", "lost", "frozen", "silenced"]


class SharedCall(nn.Module):
    """A layer called twice, of which the loss sees one call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.layer(x)
        self.layer(x * 2)
        return kept


def test_call_that_the_loss_does_not_see() -> None:
    model = SharedCall()
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    check(model, [x, x + 1], square, linears(model), 4)


class InPlace(nn.Module):
    """Changes the outputs of its layers in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h += 1
        h.relu_()
        y = self.second(h)
        y.mul_(2)
        return y


def test_outputs_changed_in_place() -> None:
    torch.manual_seed(0)
    model = InPlace()
    check(model, [torch.randn(30, 12) for _ in range(2)], square, linears(model), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    sites = select_sites(model)
    found = gradients(model, [labelled_inputs("llama")], own_loss, sites, 8)
    expected = true_gradients(model, [labelled_inputs("llama")], own_loss, sites)
    for module, (svd,) in found.svds.items():
        assert svd.Vh.dtype == torch.float32
        # bfloat16 has rounding errors of 0.4 % in every activation.
        assert spectrum(expected[module]).captured_by(svd.Vh) >= (0.97 if dtype == torch.bfloat16 else 0.999), module


# Checkpointing


class Blocks(nn.Module):
    """Blocks under checkpoints of torch's own."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(3)
        )
        self.calls = 0
        self.blocks[1].register_forward_pre_hook(lambda module, args: setattr(self, "calls", self.calls + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()  # as transformers does for the older kind
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    """Of the reentrant kind the first pass runs without gradients, and hooks fire in it too."""
    torch.manual_seed(0)
    plain = Blocks(None)
    model = Blocks(reentrant)
    model.load_state_dict(plain.state_dict())
    batches = [torch.randn(50, 16) for _ in range(2)]
    expected = gradients(plain, batches, square, linears(plain), 4)
    found = gradients(model, batches, square, linears(model), 4)
    assert (plain.calls, model.calls) == (2, 4)
    assert found.svds.keys() == expected.svds.keys() and len(found.svds) == 6
    for module, (svd,) in found.svds.items():
        assert torch.allclose(svd.Vh, expected.svds[module][0].Vh, atol=1e-4), module
        assert torch.allclose(svd.S, expected.svds[module][0].S, rtol=1e-4), module


def test_shared_layer_under_a_checkpoint() -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.requires_grad_()
            for _ in range(3):
                x = checkpoint(lambda x: torch.tanh(self.layer(x)), x, use_reentrant=True)
            return x

    model = Model()
    check(model, [torch.randn(30, 12), torch.randn(9, 12)], square, linears(model), 4)


# Errors


def test_no_batch() -> None:
    model = build("llama")
    with pytest.raises(MethodError, match="no batch"):
        gradients(model, [], own_loss, select_sites(model), 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(value: float) -> None:
    model = build("llama")
    batches = [labelled_inputs("llama")] * 2
    losses = iter([1.0, value])
    with pytest.raises(MethodError, match=f"the loss is {value} on batch 2"):
        gradients(model, batches, lambda m, b: own_loss(m, b) * next(losses), select_sites(model), 4)


def test_gradient_that_is_not_finite() -> None:
    """A finite loss can have an infinite gradient."""
    model = nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 30))
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    loss = lambda model, x: (model(x) * 0).sum().abs().sqrt()  # noqa: E731
    with pytest.raises(MethodError, match="the gradient at 1 is not finite on batch 1"):
        gradients(model, [x], loss, linears(model), 4)


def test_loss_without_the_layers() -> None:
    model = build("llama")
    loss = lambda model, batch: model.lm_head.weight.square().mean()  # noqa: E731
    with pytest.raises(MethodError, match="does not depend on any of the adapted layers"):
        gradients(model, [labelled_inputs("llama")], loss, select_sites(model), 4)


def test_progress_counts_the_layers() -> None:
    model = build("llama")
    told: list[tuple[int, int, str]] = []
    batches = [labelled_inputs("llama")]
    gradients(model, batches, own_loss, select_sites(model), 4, progress=lambda *a: told.append(a))
    assert [done for done, _, _ in told] == list(range(1, 22))
    assert {total for _, total, _ in told} == {21}
    assert told[-1][2].endswith("_proj")


def test_seed_changes_the_starting_block_alone() -> None:
    """Another seed of the range finder gives the same subspace."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400))
    scales = torch.arange(1, 301) ** -1.0
    x, y = torch.randn(200, 300) * scales, torch.randn(200, 400)
    loss = lambda model, batch: F.mse_loss(model(batch), y)  # noqa: E731
    site = site_of(model, "0", model[0])
    one, two = (gradients(copy.deepcopy(model), [x], loss, [site], 2, seed=seed).svds["0"][0] for seed in (0, 1))
    assert not torch.equal(one.Vh, two.Vh)
    assert angle(one.Vh, two.Vh) < 0.05
