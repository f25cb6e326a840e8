"""Weight changes read straight from adapter files equal what PEFT's layers compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import surgery
from surgery.adapters import names as names_module
from surgery.adapters.contents import contents_of
from surgery.adapters.names import MODEL_PREFIX
from surgery.adapters.types import tensor_checks
from surgery.errors import AdapterError
from tests.helpers.models import load_base, perturb

TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "t5": ["q", "wo"]}


def check_all(model: PeftModel, folder: Path) -> None:
    """Every layer's change, from the file and from the live layer."""
    adapter = surgery.Adapter.open(folder)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert layers
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight.detach()
        transposed = type(layer.get_base_layer()).__name__ == "Conv1D"
        delta = adapter.delta(name, weight.T if transposed else weight)
        expected = layer.get_delta_weight("default").detach()
        expected = expected.T if transposed else expected
        assert float(expected.abs().max()) > 1e-3
        assert torch.allclose(delta.dense(), expected, atol=1e-5 * float(expected.abs().max().clamp_min(1))), name


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("method", ["vera", "inilora", "frod", "smoa"])
def test_own_types_and_vera(method: str, kind: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    surgery.init(folder, method, tmp_path / "start", target=TARGETS[kind])
    model = PeftModel.from_pretrained(load_base(folder), tmp_path / "start", is_trainable=True)
    perturb(model)
    model.save_pretrained(tmp_path / "trained")
    check_all(model, tmp_path / "trained")


def test_what_stores_its_factors_needs_no_weight(llama: Path) -> None:
    """The layer's height and width are then told by its tensors."""
    adapter, _ = surgery.init(llama, "inilora", rank=3, target=["k_proj"], store_bases=True)
    name = next(iter(adapter.modules))
    own = adapter.layer(name)
    for short in ("inilora_A", "inilora_B"):
        own[short] += torch.randn(own[short].shape, generator=torch.Generator().manual_seed(0))
    weight = load_base(llama).get_submodule(name).weight.detach()
    delta = adapter.delta(name)
    assert delta.shape == weight.shape and float(delta.norm()) > 1
    torch.testing.assert_close(delta.dense(), adapter.delta(name, weight).dense())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 5, r"layers.1.*down_proj": 7}},
    ],
)
def test_stock_lora(settings, llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS["llama"], **settings}, init_lora_weights=False)
    model = get_peft_model(load_base(llama), config)
    model.save_pretrained(tmp_path / "lora")
    check_all(model, tmp_path / "lora")


def test_what_cannot_be_said_is_refused(llama: Path) -> None:
    adapter, _ = surgery.init(llama, "frod", target=["q_proj"])
    name = "model.layers.1.self_attn.q_proj"
    with pytest.raises(AdapterError, match="needs the base weight"):
        adapter.delta(name)
    with pytest.raises(AdapterError, match="no module 'nowhere'"):
        adapter.delta("nowhere")
    with pytest.raises(AdapterError, match="how wide"):
        surgery.init(llama, "vera", target=["q_proj"])[0].delta(name)
    for method in ("vera", "inilora"):
        bare, _ = surgery.init(llama, method, target=["q_proj"], store_bases=False)
        with pytest.raises(AdapterError, match=r"surgery\.load"):
            bare.delta(name)


def many_layers(count: int) -> surgery.Adapter:
    """A LoRA on one linear of each of many blocks."""
    tensors = {}
    for index in range(count):
        for name, shape in (("A", (1, 3)), ("B", (2, 1))):
            tensors[f"{MODEL_PREFIX}blocks.{index}.fc.lora_{name}.weight"] = torch.full(shape, 1.0 + index)
    return surgery.Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 2}, tensors)


def test_errors_call_an_adapter_by_its_folder(llama: Path, tmp_path: Path) -> None:
    made, _ = surgery.init(llama, "vera", target=["q_proj"])
    made.save(tmp_path / "out")
    assert made.label == "the adapter" and surgery.Adapter.open(tmp_path / "out").label == str(tmp_path / "out")


def test_names_are_sorted_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work for one layer does not grow with the others: reading all of them is linear."""
    split: list[str] = []
    real = names_module.split_name
    monkeypatch.setattr(names_module, "split_name", lambda name, kind: split.append(name) or real(name, kind))
    adapter = many_layers(50)
    for module in contents_of(adapter).modules:
        adapter.delta(module)
    assert len(split) == 100


def test_tensors_that_a_caller_changes_are_seen() -> None:
    adapter = many_layers(3)
    assert float(adapter.delta("blocks.1.fc").dense()[0, 0]) == 2 * 2 * 2
    first = f"{MODEL_PREFIX}blocks.1.fc.lora_A.weight"
    adapter.tensors[first] = torch.full((1, 3), 7.0)
    assert float(adapter.delta("blocks.1.fc").dense()[0, 0]) == 7 * 2 * 2
    adapter.tensors[first] = torch.full((1, 3), float("nan"))
    with pytest.raises(AdapterError, match="NaN"):
        adapter.delta("blocks.1.fc")
    # As many tensors as before, under other names.
    adapter.tensors[f"{MODEL_PREFIX}blocks.1.fc.lora_magnitude_vector"] = adapter.tensors.pop(first)
    with pytest.raises(AdapterError, match="DoRA"):
        adapter.delta("blocks.1.fc")
    adapter.tensors = {name: t for name, t in adapter.tensors.items() if ".1." not in name}
    assert set(adapter.modules) == {"blocks.0.fc", "blocks.2.fc"}
    with pytest.raises(AdapterError, match="no module"):
        adapter.delta("blocks.1.fc")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_numbers_that_are_not_finite_are_found_anywhere(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_checks, "CHUNK", 7)
    for shape in ((), (0, 3), (5,), (7, 3), (4, 2, 5)):
        clean = torch.ones(shape).to(dtype)
        assert tensor_checks.is_finite(clean)
        for place in {0, clean.numel() // 2, clean.numel() - 1} if clean.numel() else ():
            bad_values = (
                (float("nan"),) if dtype == torch.float8_e4m3fn else (float("nan"), float("inf"), -float("inf"))
            )
            for value in bad_values:
                bad = torch.ones(shape).reshape(-1)
                bad[place] = value
                assert not tensor_checks.is_finite(bad.to(dtype).reshape(shape)), (shape, place, value)


def lora_with_bias(llama: Path, folder: Path) -> surgery.Adapter:
    """A LoRA whose B has a bias of 0.5 in the second block, and of zeros elsewhere."""
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    model = get_peft_model(load_base(llama), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.fill_(0.5 if ".1." in name else 0.0)
    model.save_pretrained(folder)
    return surgery.Adapter.open(folder)


def test_a_bias_of_lora_b_is_kept_in_a_lora(llama: Path, tmp_path: Path) -> None:
    adapter = lora_with_bias(llama, tmp_path / "lora")
    made, _ = surgery.convert(adapter, "lora", tmp_path / "made", energy=1.0)
    module = "model.layers.1.self_attn.q_proj"
    want, found = (contents_of(each).output_bias(module) for each in (adapter, made))
    assert want is not None and found is not None and want.any() and torch.allclose(found, want)


def test_a_bias_of_lora_b_is_lost_to_no_other_form(llama: Path, tmp_path: Path) -> None:
    adapter = lora_with_bias(llama, tmp_path / "lora")
    with pytest.raises(AdapterError, match=r"a bias to the outputs of model\.layers\.1\.self_attn\.q_proj"):
        surgery.convert(adapter, "giva", energy=1.0)
    zeros = {n: torch.zeros_like(t) if n.endswith("bias") else t for n, t in adapter.tensors.items()}
    surgery.convert(surgery.Adapter(adapter.config, zeros), "giva", energy=1.0, bits=32)
