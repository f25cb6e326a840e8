"""Stock adapters read from their files equal what PEFT's layers compute; what is not read exactly is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

import surgery
from surgery.adapters.contents import contents_of, refuse_output_biases
from surgery.errors import AdapterError
from tests.helpers.models import edit_tensors, load_base
from tests.helpers.stock_adapters import saved

TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "bert": ["query", "dense"]}
FILE = "adapter_model.safetensors"


def change(layer: Any) -> torch.Tensor:
    """What PEFT adds to a layer's weight, `(out, in)`, found by merging: the reference for every type."""
    base = layer.get_base_layer()
    before = base.weight.detach().clone().double()
    base.weight.data = before.clone()
    for parameter in layer.parameters():
        parameter.data = parameter.data.double()
    for name in ("randlora_A", "randlora_B"):
        if hasattr(layer, name):
            buffers = getattr(layer, name)._buffers
            buffers["default"] = buffers["default"].double()
    layer.merge()
    result = base.weight.detach() - before
    return result.T if type(base).__name__ == "Conv1D" else result


def check_all(base: Path, folder: Path) -> None:
    """Every layer's change from the file, against PEFT's merge of the opened adapter in double precision.

    Opened, not as trained: PEFT sorts the patterns when it saves them, which can change the first that matches.
    """
    model = PeftModel.from_pretrained(load_base(base), folder)
    adapter = surgery.Adapter.open(folder)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert layers and contents_of(adapter).modules == sorted(layers)
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight.detach().clone()
        delta = adapter.delta(name, weight.T if type(layer.get_base_layer()).__name__ == "Conv1D" else weight)
        expected = change(layer)
        size = float(expected.abs().max())
        assert size > 1e-3
        assert delta.shape == tuple(expected.shape)
        assert float((delta.dense().double() - expected).abs().max()) < 2e-6 * max(size, 1), name
        # A control: another layer's change is not this one's.
        assert float((delta.dense().double() * 1.01 - expected).abs().max()) > 2e-6 * max(size, 1)


LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "rank pattern": {"rank_pattern": {"k_proj": 2, "query": 3, "c_attn": 6}},
    "alpha pattern": {"alpha_pattern": {r"(layers|h|layer)\.1\..*": 5, "q_proj": 7}},
    "first pattern wins": {"alpha_pattern": {"proj": 2, "q_proj": 7, ".*": 5}},
    "both": {"rank_pattern": {"^.*1.*$": 2}, "alpha_pattern": {"^.*1.*$": 9}, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "mica": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", LORA)
def test_lora(name: str, kind: str, model_folder, tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": TARGETS[kind], **LORA[name]}
    config = peft.LoraConfig(fan_in_fan_out=kind == "gpt2", **settings)
    saved(model_folder(kind), config, tmp_path)
    check_all(model_folder(kind), tmp_path)


OTHERS: dict[str, peft.PeftConfig] = {
    "loha": peft.LoHaConfig(r=2, alpha=3, rank_pattern={"k_proj": 3}, alpha_pattern={"q_proj": 5}),
    "loha full": peft.LoHaConfig(r=8),
    "lokr": peft.LoKrConfig(r=2, alpha=3, alpha_pattern={"k_proj": 5}, rank_pattern={"down_proj": 3}),
    "lokr whole": peft.LoKrConfig(r=32, alpha=3),
    "lokr both": peft.LoKrConfig(r=1, decompose_both=True),
    "lokr factor": peft.LoKrConfig(r=1, decompose_factor=2, decompose_both=True),
    "hira": peft.HiraConfig(r=3, rank_pattern={"k_proj": 2}),
    "randlora": peft.RandLoraConfig(r=5, randlora_alpha=7),
    "randlora even": peft.RandLoraConfig(r=4, randlora_alpha=7, sparse=True),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_stock_types(name: str, kind: str, model_folder, tmp_path: Path) -> None:
    if kind == "gpt2" and name.startswith("lo"):
        pytest.skip("PEFT adapts no Conv1D with LoHa and LoKr")
    config = type(OTHERS[name])(**{**OTHERS[name].to_dict(), "target_modules": TARGETS[kind]})
    saved(model_folder(kind), config, tmp_path)
    check_all(model_folder(kind), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_as_they_are(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    saved(llama, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]), tmp_path)

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    edit_tensors(tmp_path, halve, FILE)
    tensors = load_file(tmp_path / FILE)
    name = "model.layers.0.self_attn.q_proj"
    A, B = (tensors[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    torch.testing.assert_close(surgery.Adapter.open(tmp_path).delta(name).dense().double(), B @ A, atol=1e-6, rtol=0)


def test_what_is_carried_is_listed(model_folder, tmp_path: Path) -> None:
    folder = model_folder("bert")
    saved(folder, peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only"), tmp_path / "only")
    saved(folder, peft.LoraConfig(r=2, target_modules=["query"], bias="all"), tmp_path / "all")
    saved(model_folder("llama"), peft.LoraConfig(r=2, target_modules=["lm_head"]), tmp_path / "head")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    saved(model_folder("llama"), config, tmp_path / "embedding")
    carried = {name: contents_of(surgery.Adapter.open(tmp_path / name)).carried for name in ("only", "all", "head")}
    query = [f"encoder.layer.{layer}.attention.self.query.bias" for layer in (0, 1)]
    assert sorted(carried["only"]) == query
    assert carried["only"][query[0]] == f"base_model.model.{query[0].replace('.bias', '.base_layer.bias')}"
    assert set(query) < set(carried["all"]) and "embeddings.LayerNorm.bias" in carried["all"]
    assert carried["head"] == {"lm_head.weight": "base_model.model.lm_head.base_layer.weight"}
    embedding = contents_of(surgery.Adapter.open(tmp_path / "embedding"))
    assert list(embedding.carried) == ["model.embed_tokens.weight"]
    assert embedding.modules == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]


def test_the_bias_of_lora_b_is_a_part_of_the_layer(model_folder, tmp_path: Path) -> None:
    saved(model_folder("bert"), peft.LoraConfig(r=2, target_modules=["query"], lora_bias=True), tmp_path)
    contents = contents_of(surgery.Adapter.open(tmp_path))
    assert not contents.carried and len(contents.modules) == 2


REFUSED: dict[str, tuple[peft.PeftConfig, str, str]] = {
    "alora": (
        peft.LoraConfig(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
        "q_proj",
        "aLoRA.*invocation",
    ),
    "bdlora": (
        peft.LoraConfig(use_bdlora=peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
        "q_proj",
        "BD-LoRA",
    ),
    "kasa": (peft.LoraConfig(kasa_config=peft.KasaConfig()), "q_proj", "KaSA"),
    "pissa": (peft.LoraConfig(init_lora_weights="pissa"), "q_proj", "path_initial_model_for_weight_conversion"),
    "pissa fast": (peft.LoraConfig(init_lora_weights="pissa_niter_2"), "q_proj", "pissa_niter_2.*base weight"),
    "olora": (peft.LoraConfig(init_lora_weights="olora"), "q_proj", "path_initial_model_for_weight_conversion"),
    "oft": (peft.OFTConfig(oft_block_size=4), "q_proj", "OFT.*rotation.*merge_and_unload"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name: str, llama: Path, tmp_path: Path) -> None:
    config, target, message = REFUSED[name]
    config.target_modules = {target}
    saved(llama, config, tmp_path)
    adapter = surgery.Adapter.open(tmp_path)
    with pytest.raises(AdapterError, match=message):
        contents_of(adapter)
    module = next(module for module in adapter.modules if target in module and not module.endswith("base_layer"))
    with pytest.raises(AdapterError, match=message):
        adapter.delta(module, load_base(llama).get_submodule("model.layers.0.self_attn.q_proj").weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_converted_adapter_of_a_mutating_start_is_read(start: str, llama: Path, tmp_path: Path) -> None:
    """PEFT's own conversion on saving makes it a plain LoRA on the original base."""
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=start)
    original = load_base(llama)
    model = get_peft_model(load_base(llama), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = surgery.Adapter.open(tmp_path / "converted")
    assert adapter.config["init_lora_weights"] is True and adapter.config["r"] == 8
    merged = model.merge_and_unload()
    for module in contents_of(adapter).modules:
        before, after = (m.get_submodule(module).weight.detach() for m in (original, merged))
        torch.testing.assert_close(before + adapter.delta(module).dense(), after, atol=1e-5, rtol=0)


def test_randlora_bases_are_found_above_the_model(llama: Path, tmp_path: Path) -> None:
    """A file may hold them once for all layers, without the copies that PEFT stores with each."""
    saved(llama, peft.RandLoraConfig(r=4, randlora_alpha=7, target_modules=["q_proj"]), tmp_path)

    def keep_one(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("base_model.model.") and ".randlora_" in name]:
            if name.endswith(("_A", "_B")):
                del tensors[name]

    edit_tensors(tmp_path, keep_one, FILE)
    assert contents_of(surgery.Adapter.open(tmp_path)).shared == ["base_model.randlora_A", "base_model.randlora_B"]
    check_all(llama, tmp_path)


def test_a_bias_of_lora_b_is_lost_to_no_other_form(llama: Path, tmp_path: Path) -> None:
    """One number of it is enough; none is no bias."""
    saved(llama, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), tmp_path)

    def leave(numbers: int) -> None:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            for tensor in (each for name, each in tensors.items() if name.endswith("lora_B.bias")):
                tensor.zero_()
                tensor[:numbers] = 1

        edit_tensors(tmp_path, edit, FILE)

    leave(0)
    refuse_output_biases(contents_of(surgery.Adapter.open(tmp_path)))
    leave(1)
    with pytest.raises(AdapterError, match="adds a bias"):
        refuse_output_biases(contents_of(surgery.Adapter.open(tmp_path)))


def test_what_a_configuration_leaves_out_has_pefts_default(llama: Path, tmp_path: Path) -> None:
    saved(llama, peft.RandLoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    settings = json.loads(path.read_text())
    del settings["randlora_alpha"]
    path.write_text(json.dumps(settings))
    check_all(llama, tmp_path / "out")


MODULE = "model.layers.1.self_attn.q_proj"
A, B = (f"base_model.model.{MODULE}.lora_{letter}.weight" for letter in "AB")
BROKEN: dict[str, tuple[Any, str]] = {
    "unpaired": (lambda t: t.pop(A), rf"the file lacks lora_A.weight of {MODULE}, which PEFT would draw at random"),
    "nan": (lambda t: t[A].__setitem__((0, 0), float("nan")), rf"{MODULE}.lora_A.weight holds NaN"),
    "inf": (lambda t: t[B].__setitem__((0, 0), float("inf")), rf"{MODULE}.lora_B.weight holds NaN or Inf"),
    "integers": (lambda t: t.update({A: t[A].to(torch.int8)}), rf"{MODULE}.lora_A.weight is torch.int8"),
    "ranks": (lambda t: t.update({A: t[A][:3].clone()}), rf"{MODULE}: lora_A \(3, 32\) and lora_B \(32, 8\)"),
    "other rank": (
        lambda t: t.update({A: t[A][:3].clone(), B: t[B][:, :3].clone()}),
        rf"{MODULE}: its factors have rank 3, adapter_config.json says 8",
    ),
    "vector": (lambda t: t.update({A: t[A][0].clone()}), rf"{MODULE}: is no matrix"),
    "unknown part": (lambda t: t.update({A.replace("lora_A", "lora_C"): t[A].clone()}), "lora_C is not known"),
    "above": (lambda t: t.update({"base_model.lora_A": t[A].clone()}), "has the tensor base_model.lora_A"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name: str, llama: Path, tmp_path: Path) -> None:
    saved(llama, peft.LoraConfig(target_modules=["q_proj"]), tmp_path)
    contents_of(surgery.Adapter.open(tmp_path))  # whole, it is read
    edit_tensors(tmp_path, BROKEN[name][0], FILE)
    with pytest.raises(AdapterError, match=BROKEN[name][1]) as error:
        contents_of(surgery.Adapter.open(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha_pattern", {"(": 3}),
        ("alpha_pattern", {"q_proj": "many"}),
        ("rank_pattern", ["q_proj"]),
        ("lora_alpha", None),
        ("lora_alpha", float("inf")),
    ],
)
def test_broken_configurations_are_named(key: str, value: Any, llama: Path, tmp_path: Path) -> None:
    saved(llama, peft.LoraConfig(target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        contents_of(surgery.Adapter.open(tmp_path))
