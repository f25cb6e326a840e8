"""The model that a pass runs on: dropout, checkpointing, offloaded and quantised layers, and how it is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import pytest
import torch
import transformers
from torch import nn

import surgery
from surgery.errors import CheckpointError, DataError, MethodError
from surgery.models.sites import select_sites, target_modules
from surgery.passes.loaded_model import _moved
from tests.helpers.models import VOCAB, build, labelled_inputs, load_base, spread
from tests.helpers.reference import angle, own_loss, spectrum, true_gradients
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

RANK = 4


def bases(model: Any, kind: str = "llama", **options: Any) -> dict[str, torch.Tensor]:
    """A of every layer."""
    options = {"data": [labelled_inputs(kind)], "rank": RANK, **options}
    adapter, _ = surgery.init(model, "giva", **options)
    return {module: tensors["giva_A"] for module, tensors in adapter.modules.items() if "giva_A" in tensors}


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


# Where weights are


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


def test_bfloat16_from_the_command_lines_words(tmp_path: Path) -> None:
    """The model runs in bfloat16 and the file is in it; A is close to that of float32."""
    build("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    path = write_rows(tmp_path / "data.jsonl", text_rows(8))
    wide, _ = surgery.init(tmp_path / "model", "giva", data=path, rank=RANK)
    narrow, _ = surgery.init(tmp_path / "model", "giva", data=path, rank=RANK, dtype="bf16")
    assert {tensor.dtype for tensor in narrow.tensors.values()} == {torch.bfloat16}
    model = load_base(tmp_path / "model")
    for module, tensors in narrow.modules.items():
        A, expected = tensors["giva_A"].float(), wide.modules[module]["giva_A"]
        assert float((A @ expected.T).square().sum()) > 0.8 * RANK, module
    assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "fp16"])
def test_float16_underflows(dtype: str) -> None:
    with pytest.raises(MethodError, match=r"float32 or bfloat16, not in torch\.float16: they would underflow"):
        bases(build("llama"), dtype=dtype)


# A live model


def test_live_model_of_any_kind(tmp_path: Path) -> None:
    """No transformers model, batches that are tuples, a loss of one's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    batches = [(torch.randn(9, 12), torch.randint(0, 4, (9,))) for _ in range(2)]
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    adapter, report = surgery.init(model, "giva", tmp_path / "out", data=iter(batches), loss=loss, target=["0", "2"])
    assert report.notes == ["rank 8 is capped at min(in, out) in 1 of 2 layers (down to 4)"]
    assert report.samples is None
    assert report.loss == pytest.approx(sum(float(loss(model, batch).detach()) for batch in batches) / 2)
    assert adapter.modules["0"]["giva_A"].shape == (8, 12)
    from peft import PeftModel

    x = torch.randn(3, 12)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")(x), model(x))


def test_live_classifier_brings_its_head(model_folder, tmp_path: Path) -> None:
    """A head that was drawn anew is in no file but the adapter's."""
    torch.manual_seed(5)
    model = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=4)
    batch = {**labelled_inputs("bert"), "labels": torch.tensor([0, 3, 1, 2])}
    adapter, report = surgery.init(model, "giva", tmp_path / "out", data=[batch])
    assert (adapter.config["task_type"], adapter.config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert torch.equal(adapter.modules["classifier"]["weight"], model.classifier.weight)
    assert report.notes == []
    # And surgery.load gives the bare checkpoint a head of that size.
    loaded = surgery.load(tmp_path / "out", model_folder("bert"))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, model.eval()(**inputs).logits, atol=1e-6)


def test_batch_of_a_tokenizer(tmp_path: Path) -> None:
    """`BatchEncoding` is a mapping, and no dictionary."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    batch = tokenizer(["w5 w6 w7 w8", "w9 w10 w11"], padding=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"]
    assert bases(build("llama"), data=[batch]).keys() == bases(build("llama")).keys()


class Pair(NamedTuple):
    """What a loader may give."""

    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("wrap", [dict, transformers.BatchEncoding, lambda found: [found], lambda found: (found, 3)])
def test_batches_go_where_the_model_is(wrap: Callable[[Any], Any]) -> None:
    tensors = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "weights": torch.ones(2)}
    moved = _moved(wrap(tensors), torch.device("meta"), torch.bfloat16)
    inner = moved[0] if isinstance(moved, (list, tuple)) else moved
    assert {value.device.type for value in inner.values()} == {"meta"}
    assert (inner["input_ids"].dtype, inner["weights"].dtype) == (torch.int64, torch.bfloat16)
    pair = _moved(Pair(*tensors.values()), torch.device("meta"), None)
    assert isinstance(pair, Pair) and pair.x.device.type == pair.y.device.type == "meta"


def test_loader_of_batches() -> None:
    rows = [{name: value[index] for name, value in labelled_inputs("llama", 6).items()} for index in range(6)]
    loader = torch.utils.data.DataLoader(rows, batch_size=3)
    expected = bases(build("llama"), data=[labelled_inputs("llama", 6)])
    found = bases(build("llama"), data=loader)
    assert all(float((A @ expected[module].T).square().sum()) > 0.5 * RANK for module, A in found.items())


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (None, MethodError, "starts from the gradient of a loss"),
        (5, DataError, "a file or an iterable of batches, not int"),
        ([], MethodError, "the data gave no batch"),
        ([{"input_ids": torch.ones(2, 3, dtype=torch.int64)}], DataError, "gives no loss for these batches"),
    ],
)
def test_bad_batches(data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bases(build("llama"), data=data)


def test_other_methods_read_files() -> None:
    with pytest.raises(MethodError, match="inilora reads a model's files"):
        surgery.init(build("llama"), "inilora")


def test_unknown_task_of_a_live_model() -> None:
    with pytest.raises(CheckpointError, match="unknown task 'nope'"):
        bases(build("llama"), task="nope")


def test_layers_without_a_gradient_are_named_and_left_out(model_folder) -> None:
    """The loss sees the first two positions of the encoder's output alone, and a decoder that is not asked."""
    model = build("t5")
    loss = lambda model, batch: model.encoder(batch["input_ids"]).last_hidden_state.square().mean()  # noqa: E731
    adapter, report = surgery.init(model, "giva", data=[labelled_inputs("t5")], loss=loss)
    assert report.modules == 14
    assert all(module.startswith("encoder.") for module in adapter.modules)
    (note,) = [line for line in report.notes if "no gradient" in line]
    assert note.startswith("no gradient reaches decoder.block.0.layer.0.SelfAttention.q, ") and "left out" in note
    matched = [site for site in select_sites(model) if site.module in adapter.modules]
    assert adapter.config["target_modules"] == target_modules(model, matched)
