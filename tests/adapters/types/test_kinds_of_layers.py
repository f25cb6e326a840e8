"""LoRA and DoRA on embeddings, convolutions and linears together: every verb does what stock PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery.errors import AdapterError
from surgery.models.sites import Form, adaptable_sites
from tests.helpers.kinds import base_of, trained, verbs
from tests.helpers.models import edit_tensors, load_base

FILE = "adapter_model.safetensors"
# Base, targets, and further settings.
KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "embedding and linear": ("llama", ["embed_tokens", "q_proj"], {}),
    "embedding alone, rsLoRA": ("llama", ["embed_tokens"], {"use_rslora": True, "alpha_pattern": {"embed_tokens": 3}}),
    "scaled and tied embedding": ("gemma", ["embed_tokens", "q_proj"], {}),
    "convolution 1x1": ("resnet", r".*layers\.\d\.layer\.[02]\.convolution", {}),
    "convolution 3x3": ("resnet", r".*layers\.\d\.layer\.1\.convolution", {"r": 3}),
    "convolution 1-D": ("wav2vec2", r".*conv_layers\.\d\.conv|.*q_proj", {}),
    "convolution 3-D": ("videomae", ["projection", "query"], {}),
    "patches and Linear": ("vit", ["projection", "fc1", "classifier"], {}),
    "DoRA of an embedding": ("llama", ["embed_tokens", "q_proj"], {"use_dora": True}),
    "DoRA of convolutions": ("resnet", r".*layers\.\d\.layer\.[01]\.convolution", {"use_dora": True}),
    "DoRA 1-D": ("wav2vec2", r".*conv_layers\.1\.conv|.*v_proj", {"use_dora": True}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_as_stock_peft_has_it(name: str, tmp_path: Path) -> None:
    kind, targets, settings = KINDS[name]
    base = base_of(kind, tmp_path / "base")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}, target_modules=targets)
    trained(base, tmp_path / "made", config)
    forms = ("giva",) if config.use_dora else ("lora", "giva")
    found = dict(verbs(kind, base, tmp_path / "made", tmp_path, forms))
    assert max(found.values()) < 1e-4 and max(found["merge"], found["load"]) < 1e-5, found
    assert surgery.compare(tmp_path / "made", tmp_path / "made", base=base).weight_error == 0
    assert surgery.compare(tmp_path / "made", tmp_path / "giva", base=base).weight_error < 1e-5
    inspected = surgery.inspect(tmp_path / "giva", base=base)
    assert inspected.modules == len(inspected.sites) and all(site.norm for site in inspected.sites)


@pytest.mark.filterwarnings("ignore")
def test_a_packed_file_says_its_kinds_and_needs_no_base(tmp_path: Path) -> None:
    base = base_of("resnet", tmp_path / "base")
    targets = r".*layers\.\d\.layer\.[01]\.convolution"
    trained(base, tmp_path / "made", peft.LoraConfig(r=2, target_modules=targets))
    giva, _ = surgery.convert(tmp_path / "made", "giva", tmp_path / "giva", energy=1.0)
    assert giva.config["format_version"] == 3
    assert set(giva.config["kinds"].values()) == {"convolution 1x1", "convolution 3x3"}
    surgery.convert(tmp_path / "giva", "lora", tmp_path / "lora", energy=1.0, dtype="float32")
    old, new = load_file(tmp_path / "made" / FILE), load_file(tmp_path / "lora" / FILE)
    assert {name: tensor.shape for name, tensor in old.items()} == {name: tensor.shape for name, tensor in new.items()}
    plain, _ = surgery.convert(_linear(tmp_path), "giva", energy=1.0)
    assert plain.config["format_version"] == 1 and "kinds" not in plain.config


# Base, configuration: what adds to outputs, on layers with a bias of their own.
BIASES: dict[str, tuple[str, Any]] = {
    "lora_bias": ("qwen", lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "IA3": ("qwen", lambda: peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])),
}
# A packed layer has gains on outputs, and no other bias.
REFUSED = {"lora_bias": "giva", "IA3": "vera"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora_bias", "IA3"])
def test_biases_of_outputs_are_kept_in_a_lora_and_lost_to_no_other_form(name: str, tmp_path: Path) -> None:
    kind, config = BIASES[name]
    base = base_of(kind, tmp_path / "base")
    trained(base, tmp_path / "made", config())
    found = dict(verbs(kind, base, tmp_path / "made", tmp_path, ("lora",)))
    assert max(found.values()) < 1e-4, found
    with pytest.raises(AdapterError, match=r"for which only a LoRA has a place; use --to lora"):
        surgery.convert(tmp_path / "made", REFUSED[name], base=base, energy=1.0)
    # A layer whose factors are cut to nothing keeps its bias.
    cut, _ = surgery.convert(tmp_path / "made", "lora", base=base, rank=1, accept_loss=True, per_layer_ranks=True)
    assert len([n for n in cut.tensors if n.endswith("lora_B.bias")]) == 4 and cut.config["lora_bias"] is True


def _linear(folder: Path) -> Path:
    base = base_of("llama", folder / "llama")
    trained(base, folder / "linear", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return folder / "linear"


@pytest.mark.filterwarnings("ignore")
def test_what_no_weight_change_does_is_refused_by_name(tmp_path: Path) -> None:
    base = base_of("resnet", tmp_path / "base")
    trained(base, tmp_path / "made", peft.LoraConfig(r=4, target_modules=r".*layers\.0\.layer\.1\.convolution"))

    def grouped(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "lora_B" in name]:
            tensors[name] = tensors[name][:, :2].clone()

    edit_tensors(tmp_path / "made", grouped, FILE)
    with pytest.raises(AdapterError, match="of a convolution in 2 groups, where PEFT's LoRA mixes the groups"):
        surgery.merge(tmp_path / "made", base, tmp_path / "merged")
    base = base_of("llama", tmp_path / "llama")
    trained(base, tmp_path / "embedding", peft.LoraConfig(r=4, target_modules=["embed_tokens"]))
    for form, options in (("vera", {"rank": 2}), ("frod", {"base": base}), ("smoa", {"rank": 2, "base": base})):
        with pytest.raises(AdapterError, match=r"embed_tokens, which is of the kind embedding, and .* linear layers"):
            surgery.convert(tmp_path / "embedding", form, **options)


@pytest.mark.filterwarnings("ignore")
def test_a_kernel_of_another_shape_is_another_base(tmp_path: Path) -> None:
    """3 x 3 from 2 channels, and 18 inputs by 1 x 1, are matrices of one shape."""
    base = base_of("resnet", tmp_path / "base")
    trained(base, tmp_path / "made", peft.LoraConfig(r=4, target_modules=r".*layers\.0\.layer\.1\.convolution"))

    def flat(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "lora_A" in name]:
            tensors[name] = tensors[name].flatten(1)[..., None, None].clone()

    edit_tensors(tmp_path / "made", flat, FILE)
    with pytest.raises(AdapterError, match="kind convolution 1x1, the base has one of the kind convolution 3x3"):
        surgery.merge(tmp_path / "made", base, tmp_path / "merged")


def test_a_weight_as_a_matrix_and_back(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.grouped, self.line = nn.Embedding(7, 5), nn.Conv2d(4, 6, (2, 3), groups=2), nn.Linear(3, 4)
            self.up = nn.ConvTranspose2d(4, 6, 2)

    model = Model()
    sites = {site.module: site for site in adaptable_sites(model)}
    assert list(sites) == ["table", "grouped", "line"]
    assert [str(site.form) for site in sites.values()] == ["embedding", "convolution 2x3", "linear"]
    for site in sites.values():
        weight = model.get_parameter(site.parameter)
        matrix = site.matrix(weight)
        assert tuple(matrix.shape) == (site.out_features, site.in_features)
        assert torch.equal(site.stored(matrix), weight) and Form.parsed(str(site.form)) == site.form
    for text in ("convolution", "convolution 0x3", "convolution 1x1x1x1", "embedding 3", "rotation", ""):
        assert Form.parsed(text) is None


@pytest.mark.filterwarnings("ignore")
def test_a_packed_embedding_trains(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    trained(base, tmp_path / "made", peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    surgery.convert(tmp_path / "made", "giva", tmp_path / "giva", base=base, energy=0.99)
    model = surgery.load(tmp_path / "giva", load_base(base), is_trainable=True)
    ids = torch.arange(3, 15).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    name = "base_model.model.model.embed_tokens.giva_o.default"
    gradient = dict(model.named_parameters())[name].grad
    assert gradient is not None and bool(gradient.any())
    model.save_pretrained(tmp_path / "again")
    assert surgery.compare(tmp_path / "giva", tmp_path / "again").weight_error == 0


# Of a bottleneck's convolutions 1 x 1 and 3 x 3.
OTHERS: dict[str, peft.PeftConfig] = {
    "LoHa": peft.LoHaConfig(r=2),
    "LoHa in Tucker form": peft.LoHaConfig(r=2, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=2),
    "LoKr in two factors": peft.LoKrConfig(r=1, use_effective_conv2d=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_other_types_on_convolutions(name: str, tmp_path: Path) -> None:
    base = base_of("resnet", tmp_path / "base")
    config = OTHERS[name]
    config.target_modules = r".*layers\.\d\.layer\.[01]\.convolution"
    trained(base, tmp_path / "made", config, 0.3)
    found = dict(verbs("resnet", base, tmp_path / "made", tmp_path, ("giva",)))
    assert max(found["merge"], found["load"]) < 1e-5 and max(found.values()) < 5e-4, found
