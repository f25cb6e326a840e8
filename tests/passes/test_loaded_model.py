"""What a gradient pass cannot use is refused before it begins, and named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import nn

import surgery
from surgery.errors import CheckpointError, MethodError, TargetError
from surgery.models.sites import select_sites
from tests.helpers.bad_input import Edit, case, check_refused, entry, nothing, tensor, without_tensor
from tests.helpers.gradient_starts import bases
from tests.helpers.models import VOCAB, build, labelled_inputs, spread
from tests.helpers.reference import angle, own_loss, spectrum, true_gradients
from tests.helpers.texts import text_rows, write_rows

BAD_GIVA = [
    case("rank", nothing, {"rank": 0}, MethodError, ("rank", "got 0")),
    case("samples", nothing, {"samples": 0}, MethodError, ("samples must be at least 1, got 0",)),
    case("batch-size", nothing, {"batch_size": -1}, MethodError, ("batch_size must be at least 1, got -1",)),
    case("float16", nothing, {"dtype": "float16"}, MethodError, ("float32 or bfloat16", "would underflow")),
    case(
        "bases-from-the-gradient",
        nothing,
        {"variant": "vru2r", "store_bases": False},
        MethodError,
        ("variant vru2r", "store the bases"),
    ),
    case("split-matches-nothing", nothing, {"split": {"c_attn": 3}}, MethodError, ("split c_attn", "no adapted layer")),
    case(
        "split-does-not-divide",
        nothing,
        {"split": {"q_proj": 3}},
        MethodError,
        ("q_proj has 32 outputs, which 3 does not divide",),
    ),
    case(
        "split-of-other-heights",
        nothing,
        {"split": {"q_proj": [30, 3]}},
        MethodError,
        ("q_proj has 32 outputs, not 30 + 3",),
    ),
    case(
        "split-of-two-kinds",
        nothing,
        {"split": {"self_attn.q_proj": 2, "proj": 2}},
        MethodError,
        ("split proj: no adapted layer",),
    ),
    case("missing-weight", without_tensor(), {}, CheckpointError, ("no weights for model.layers.1.self_attn.q_proj",)),
    case("nan-weight", entry(float("nan")), {}, MethodError, ("the loss is nan on batch 1",)),
    case("other-shape", tensor(lambda weight: weight[:-1].clone()), {}, CheckpointError, ("cannot be loaded",)),
    case("no-such-target", nothing, {"target": ["nope"]}, TargetError, ("'nope' matches no module",)),
]


@pytest.mark.parametrize(("edit", "options", "error", "words"), BAD_GIVA)
def test_giva_refused(edit: Edit, options, error, words: tuple[str, ...], learner: Path, tmp_path: Path) -> None:
    edit(learner)
    data = write_rows(tmp_path / "data.jsonl", text_rows(4))
    check_refused(tmp_path, error, words, learner, "giva", data=data, **options)


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], sine: float = 1e-3) -> None:
    assert found.keys() == expected.keys()
    assert max(angle(A, expected[module]) for module, A in found.items()) <= sine


def dropping(kind: str) -> Any:
    """A tiny model with much dropout, of every kind that transformers has: as modules and as functions."""
    torch.manual_seed(0)
    if kind == "bart":
        settings = {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        }
        sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40}
        rates = {"dropout": 0.4, "attention_dropout": 0.4, "activation_dropout": 0.4, "encoder_layerdrop": 0.5}
        model: Any = transformers.BartForConditionalGeneration(
            transformers.BartConfig(vocab_size=VOCAB, **settings, **sizes, **rates)
        )
    elif kind == "t5":
        model = build("t5")
        config = copy.deepcopy(model.config)
        config.dropout_rate = 0.4
        model = transformers.T5ForConditionalGeneration(config)
    else:
        config = copy.deepcopy(build("gpt2").config)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.4
        model = transformers.GPT2LMHeadModel(config)
    spread(model)
    return model


def inputs_for(kind: str) -> dict[str, torch.Tensor]:
    return labelled_inputs("t5" if kind == "bart" else kind)


def state_of(model: Any) -> dict[str, Any]:
    """All that a pass could leave changed."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "values": {name: value.clone() for name, value in model.state_dict().items()},
    }


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    values = all(torch.equal(one["values"][name], value) for name, value in other["values"].items())
    return values and all(one[key] == other[key] for key in one if key != "values")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "t5", "bart"])
def test_dropout_is_off_and_the_model_left_as_it_was(kind: str, checkpointing: bool) -> None:
    model = dropping(kind).train()
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    sites = select_sites(model)
    true = true_gradients(model, [inputs_for(kind)], own_loss, sites)
    assert same_state(before, state_of(model))
    whole = {"c_attn": 1} if kind == "gpt2" else None
    found = bases(model, data=[inputs_for(kind)], gradient_checkpointing=checkpointing, split=whole)
    assert same_state(before, state_of(model))
    for module, A in found.items():
        assert spectrum(true[module]).captured_by(A) >= 0.995, module
    # The control: with dropout these are other gradients.
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_()
    own_loss(model, inputs_for(kind)).backward()
    weight = model.get_submodule(sites[-1].module).weight
    G = weight.grad.T if sites[-1].transposed else weight.grad
    assert float((G.double() - true[sites[-1].module]).norm() / true[sites[-1].module].norm()) > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "vit"])
def test_checkpointing_is_on_and_changes_nothing(kind: str) -> None:
    model = build(kind)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    calls: list[int] = []
    inner = next(module for module in blocks[1].modules() if "Norm" in type(module).__name__)
    inner.register_forward_pre_hook(lambda module, args: calls.append(1))
    expected = bases(model, kind)
    plain = len(calls)
    found = bases(model, kind, gradient_checkpointing=True)
    assert (plain, len(calls) - plain) == (1, 2)
    check_same(found, expected)
    bases(model, kind)
    assert len(calls) == 4 * plain


def test_model_without_checkpointing() -> None:
    with pytest.raises(MethodError, match="Sequential does not support gradient checkpointing"):
        surgery.init(
            nn.Sequential(nn.Linear(4, 4)),
            "giva",
            data=[torch.randn(5, 4)],
            loss=lambda model, x: model(x).square().mean(),
            target=["0"],
            gradient_checkpointing=True,
        )


@pytest.mark.parametrize("place", ["cpu offload", "disk offload"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_that_are_fetched_when_they_are_used(place: str, checkpointing: bool, tmp_path: Path) -> None:
    model = build("llama")
    expected = bases(model)
    if place == "cpu offload":
        offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    else:
        offloaded = accelerate.disk_offload(copy.deepcopy(model), tmp_path, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    check_same(bases(offloaded, gradient_checkpointing=checkpointing), expected)
    assert all(parameter.requires_grad for parameter in offloaded.parameters())
    assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())


def test_device_map(llama: Path, tmp_path: Path) -> None:
    expected = bases(llama)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    blocks = {f"model.layers.{index}": "disk" if index else "cpu" for index in range(3)}
    model = transformers.LlamaForCausalLM.from_pretrained(
        llama, device_map={**places, **blocks}, offload_folder=tmp_path, dtype=torch.float32
    )
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    check_same(bases(model), expected)


class Int8Linear(nn.Linear):
    """A linear whose weight is no floating-point number, as quantised ones have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def quantised(model: Any) -> Any:
    for site in select_sites(model):
        parent, _, name = site.module.rpartition(".")
        setattr(model.get_submodule(parent), name, Int8Linear(model.get_submodule(site.module)))
    return model


def rounded(model: Any) -> Any:
    """The same values in floating point."""
    with torch.no_grad():
        for site in select_sites(model):
            layer = Int8Linear(model.get_submodule(site.module))
            model.get_submodule(site.module).weight.copy_(layer.weight.float() * layer.scale)
    return model


@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
def test_quantised_layers(kind: str) -> None:
    check_same(bases(quantised(build(kind)), kind), bases(rounded(build(kind)), kind))
