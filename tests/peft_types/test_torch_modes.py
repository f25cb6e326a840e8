"""What trainers, compilers and process pools do to a model of each of our types, against autograd and eager calls."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import surgery
from surgery.errors import AdapterError, WrongBaseError
from surgery.methods.frod import FrodPortableConfig
from surgery.methods.giva import GivaConfig
from surgery.methods.inilora import IniloraConfig
from surgery.methods.registry import own_types
from surgery.methods.smoa import SmoaConfig
from surgery.peft_types.layer import AdapterLayer

TARGETS = {"target_modules": ["a", "b"]}
CONFIGS: dict[str, Any] = {
    "giva": lambda: GivaConfig(r=3, init_weights=False, **TARGETS),
    "inilora": lambda: IniloraConfig(r=3, **TARGETS),
    "frod": lambda: FrodPortableConfig(sparse_rate=0.1, **TARGETS),
    "smoa": lambda: SmoaConfig(r=4, **TARGETS),
    "smoa-components": lambda: SmoaConfig(r=4, variant="components", **TARGETS),
}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two linears with a nonlinearity between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


@pytest.fixture(params=sorted(CONFIGS))
def model(request) -> Any:
    """A model with a moved adapter of each type, in evaluation."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(Two(), CONFIGS[request.param]()).eval()
    for layer in layers(adapted):
        if request.param == "giva":  # its start needs data
            layer.set_stored("default", {n: torch.randn_like(t) for n, t in layer.stored("default").items()})
    layers(adapted)[0].attachments["default"].prepare()
    with torch.no_grad():
        for tensor in trained(adapted).values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return adapted


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def loss_of(model: nn.Module, x: torch.Tensor = X) -> Any:
    def loss(parameters: dict[str, torch.Tensor], given: torch.Tensor = x) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (given,)).square().sum()

    return loss


def gradients(model: nn.Module, x: torch.Tensor = X) -> dict[str, torch.Tensor]:
    """By autograd, in evaluation."""
    tensors = trained(model)
    found = torch.autograd.grad(model.eval()(x).square().sum(), list(tensors.values()))
    return dict(zip(tensors, found, strict=True))


def detached(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trained(model).items()}


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_type_is_here() -> None:
    assert {CONFIGS[name]().peft_type for name in CONFIGS} == own_types()


# What torch does


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_export(model, strict: bool) -> None:
    close(torch.export.export(model, (X,), strict=strict).module()(X), model(X))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_compile_without_breaks(model, mode: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model.train(mode), fullgraph=True, backend="aot_eager")
    tensors = trained(model)
    found = torch.autograd.grad(compiled(X).square().sum(), list(tensors.values()))
    close(dict(zip(tensors, found, strict=True)), gradients(model))


def test_jit_trace(model) -> None:
    traced = torch.jit.trace(model, (X,), check_trace=False)
    close(traced(X * 2), model(X * 2))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_func_grad(model, mode: bool) -> None:
    expected = gradients(model)
    assert all(float(gradient.norm()) > 0 for gradient in expected.values())
    close(torch.func.grad(loss_of(model.train(mode)))(detached(model)), expected)


def test_gradients_of_each_sample(model) -> None:
    found = torch.vmap(torch.func.grad(loss_of(model)), in_dims=(None, 0))(detached(model), X[:, None])
    for index in range(len(X)):
        close({name: tensor[index] for name, tensor in found.items()}, gradients(model, X[index : index + 1]))


def test_jvp(model) -> None:
    tensors = detached(model)
    directions = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    _, found = torch.func.jvp(loss_of(model), (tensors,), (directions,))
    close(found, sum((g * directions[name]).sum() for name, g in gradients(model).items()))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_double_backward(model, mode: bool) -> None:
    """The gradient of the gradient's norm, as gradient penalties want it, against differences in float64."""
    model.double().train(mode)
    tensors, x = list(trained(model).values()), X.double()

    def penalty() -> torch.Tensor:
        first = torch.autograd.grad(model(x).square().sum(), tensors, create_graph=True)
        return torch.stack([gradient.square().sum() for gradient in first]).sum()

    direction = [torch.randn_like(tensor) for tensor in tensors]
    second = torch.autograd.grad(penalty(), tensors)
    slope = sum((g * d).sum() for g, d in zip(second, direction, strict=True))
    ends = []
    for step in (1e-6, -1e-6):
        for tensor, d in zip(tensors, direction, strict=True):
            tensor.data.add_(d, alpha=step)
        ends.append(penalty().detach())
        for tensor, d in zip(tensors, direction, strict=True):
            tensor.data.sub_(d, alpha=step)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


# What trainers and pools do


def test_copies_compute_the_same(model) -> None:
    expected = model(X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(copied(X), expected)
        assert type(copied.base_model) is type(model.base_model)
        assert torch.equal(copied.merge_and_unload()(X), copy.deepcopy(model).merge_and_unload()(X))
    assert torch.equal(model(X), expected)


def test_a_process_that_has_not_imported_surgery_unpickles(model, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(pickle.dumps((model, X, model(X).detach())))
    code = f"""
import pickle, sys
assert "surgery" not in sys.modules
model, x, expected = pickle.load(open({str(tmp_path / "model")!r}, "rb"))
assert bool((model(x) - expected).abs().max() < 1e-6)
model.save_pretrained({str(tmp_path / "saved")!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert surgery.Adapter.open(tmp_path / "saved").peft_type == model.active_peft_config.peft_type


def opened_again(model: Any, folder: Path) -> Any:
    """The adapter of a model, saved and opened on the same base for training."""
    model.save_pretrained(folder)
    base = Two()
    base.load_state_dict(
        {k.replace("base_layer.", ""): v for k, v in model.get_base_model().state_dict().items() if "base_layer" in k}
    )
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()


@pytest.mark.parametrize("configuration", [lambda config: config, copy.deepcopy], ids=["the same", "a copy"])
def test_a_reference_adapter_is_a_copy_of_what_was_loaded(model, configuration, tmp_path: Path) -> None:
    """As TRL makes one: a second adapter of the first one's configuration, and a copy of each parameter."""
    live = opened_again(model, tmp_path)
    expected = live(X).detach()
    torch.testing.assert_close(expected, model(X))
    live.add_adapter("ref", configuration(live.peft_config["default"]))
    for name, tensor in live.named_parameters():
        if ".default" in name:
            live.get_parameter(name.replace(".default", ".ref")).data.copy_(tensor.data)
    live.set_adapter("ref")
    assert torch.equal(live(X), expected)
    live.set_adapter("default")
    with torch.no_grad():
        for tensor in trained(live).values():
            tensor.mul_(1.5)
    assert not torch.allclose(live(X), expected)
    live.set_adapter("ref")
    assert torch.equal(live(X), expected)


def test_a_file_that_lacks_tensors_is_not_filled_from_an_equal_adapter(model, tmp_path: Path) -> None:
    live = opened_again(model, tmp_path / "whole")
    adapter = surgery.Adapter.open(tmp_path / "whole")
    adapter.tensors.pop(next(name for name in adapter.tensors if ".a." in name))
    adapter.save(tmp_path / "part")
    with pytest.raises(AdapterError, match="lacks 1 of the adapter's tensors"):
        live.load_adapter(tmp_path / "part", "other")
    live.set_adapter("other")
    with pytest.raises(AdapterError, match="was never loaded"):
        live(X)


def test_an_adapter_of_another_configuration_is_not_copied(model, tmp_path: Path) -> None:
    live = opened_again(model, tmp_path)
    config = copy.deepcopy(live.peft_config["default"])
    config.seed += 1
    live.add_adapter("other", config)
    live.set_adapter("other")
    with pytest.raises(AdapterError, match=r"was never loaded.*init_weights=True"):
        live(X)


def test_offloaded_tensors_are_refused_or_right(model) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = model(X)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    try:
        found = model(X)
    except AdapterError as error:
        assert "moved away by accelerate" in str(error)
    else:
        assert torch.equal(found, expected)


def test_each_sample_has_its_adapter(model, tmp_path: Path) -> None:
    live = opened_again(model, tmp_path)
    live.add_adapter("other", live.peft_config["default"])
    with torch.no_grad():
        for name, tensor in live.named_parameters():
            if ".other" in name and "base_layer" not in name:
                tensor.mul_(1.5)
    expected = []
    for name in ("default", "other"):
        live.set_adapter(name)
        expected.append(live(X).detach())
    with live.disable_adapter():
        expected.append(live(X).detach())
    assert all(not torch.allclose(expected[a], expected[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    live.set_adapter("default")
    found = live(torch.cat([X, X]), adapter_names=["other", "__base__", "default", "default", "other", "__base__"])
    order = [(1, 0), (2, 1), (0, 2), (0, 0), (1, 1), (2, 2)]
    close(found, torch.stack([expected[which][row] for which, row in order]))
    close(live(X), expected[0])


def test_misused_adapter_names_are_refused(model) -> None:
    with pytest.raises(ValueError, match="2 names for a batch of 3"):
        model(X, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="no adapter nope, it has default"):
        model(X, adapter_names=["nope"] * 3)
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        model.train()(X, adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter first"):
        model(X, adapter_names=["default"] * 3)


def test_what_other_types_do_is_refused_by_name(model, tmp_path: Path) -> None:
    title = model.base_model.method.info.title
    with pytest.raises(AdapterError, match=f"a sum of {title} adapters"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match=f"'{model.active_peft_config.peft_type.value}' is not compatible"):
        peft.get_peft_model(Two(), model.active_peft_config, mixed=True)


def moved_again(model: Any, folder: Path) -> torch.Tensor:
    """Save another adapter of the model's configuration; returns its outputs. The model is as before."""
    held = {name: tensor.detach().clone() for name, tensor in trained(model).items()}
    with torch.no_grad():
        for tensor in trained(model).values():
            tensor.mul_(1.5)
    model.save_pretrained(folder)
    found: torch.Tensor = model(X).detach()
    with torch.no_grad():
        for name, tensor in trained(model).items():
            tensor.copy_(held[name])
    return found


def test_hot_swap(model, tmp_path: Path) -> None:
    """To the other adapter and back, in evaluation and in training, whose caches are of the new tensors."""
    before = model(X).detach()
    expected = moved_again(model, tmp_path / "other")
    model.save_pretrained(tmp_path / "first")
    close(model.train()(X), before)
    hotswap_adapter(model, str(tmp_path / "other"), "default")
    close(model(X), expected)
    close(model.eval()(X), expected)
    hotswap_adapter(model, str(tmp_path / "first"), "default")
    assert torch.equal(model(X), before)


def test_hot_swap_refuses_what_is_not_alike(model, tmp_path: Path) -> None:
    before = model(X).detach()
    model.save_pretrained(tmp_path / "whole")
    adapter = surgery.Adapter.open(tmp_path / "whole")
    adapter.config["dropout"] = 0.5
    adapter.save(tmp_path / "dropout")
    with pytest.raises(AdapterError, match=r"differ in dropout \(0.0 and 0.5\); load the new one with load_adapter"):
        hotswap_adapter(model, str(tmp_path / "dropout"), "default")
    adapter.config["dropout"] = 0.0
    name = next(name for name in adapter.tensors if ".a." in name)
    tensor = adapter.tensors.pop(name)
    adapter.save(tmp_path / "part")
    with pytest.raises(AdapterError, match=r"the file lacks base_model\.model\.a\."):
        hotswap_adapter(model, str(tmp_path / "part"), "default")
    adapter.tensors[name] = torch.cat([tensor, tensor])
    adapter.save(tmp_path / "shape")
    with pytest.raises(AdapterError, match="has shape"):
        hotswap_adapter(model, str(tmp_path / "shape"), "default")
    if model.base_model.method.needs_base(model.active_peft_config):
        adapter.tensors[name] = tensor
        adapter.config["base_fingerprint"] = dict.fromkeys(adapter.config["base_fingerprint"], "0")
        adapter.save(tmp_path / "base")
        with pytest.raises(WrongBaseError):
            hotswap_adapter(model, str(tmp_path / "base"), "default")
    assert torch.equal(model(X), before)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="is merged; call unmerge_adapter first"):
        hotswap_adapter(model, str(tmp_path / "whole"), "default")


def test_a_saved_configuration_alone_says_how_to_start(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"PeftModel.from_pretrained, or start afresh with init_weights=True"):
        peft.get_peft_model(Two(), config)(X)
    if model.active_peft_config.peft_type != "GIVA":  # whose start needs data
        config.init_weights = True
        base = Two()
        torch.testing.assert_close(peft.get_peft_model(copy.deepcopy(base), config)(X), base(X))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_configuration_that_is_saved_alone_starts_afresh(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    config.save_pretrained(str(tmp_path))
    again = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert again.to_dict() == config.to_dict()
    if name != "giva":  # whose start needs data
        torch.manual_seed(0)
        base = Two()
        started = peft.get_peft_model(copy.deepcopy(base), again)
        torch.testing.assert_close(started(X), base(X))
        started.peft_config["default"].save_pretrained(str(tmp_path))  # as transformers does, with tensors beside it
        assert not peft.PeftConfig.from_pretrained(str(tmp_path)).init_weights


def test_an_offloaded_base_is_refused(model, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    base = accelerate.cpu_offload(Two(), execution_device=torch.device("cpu"))
    with pytest.raises(AdapterError, match="the base weight is on the meta device, moved away by accelerate"):
        peft.PeftModel.from_pretrained(base, tmp_path)
