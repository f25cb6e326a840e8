"""FRoD from other adapters: the best fit on its support, and the stated loss is the true one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MethodError, WrongBaseError
from tests.converters.on_data import output_errors
from tests.helpers.conversions import WEIGHTS, dense, trained
from tests.helpers.models import edit_tensors, load_base, model_inputs, output, relative_difference, save_model
from tests.helpers.stock_adapters import randomise

PREFIX = "frod_portable_"


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Path:
    """A LoRA on some linears of the tiny grouped-query Llama."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], task_type="CAUSAL_LM")
    return trained(load_base(llama), config, tmp_path / "source")


def weight_of(model: Any, module: str) -> torch.Tensor:
    layer = model.get_submodule(module)
    weight = layer.weight.detach().double()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def frod_dense(made: Path, model: Any, module: str) -> torch.Tensor:
    """`U (diag(l) + S) V^T - W` from the file and the base, with U solved from V, float64."""
    modules = surgery.Adapter.open(made).modules
    own = modules[module]
    role = {name: tensors for name, tensors in modules.items() if f"{PREFIX}V" in tensors and alike(name, module)}
    shared = next(iter(role.values()))
    V = shared[f"{PREFIX}V"].double()
    W = weight_of(model, module)
    product = torch.linalg.solve(V, W.T).T  # W V^-T
    l0 = product.norm(dim=0)
    U = torch.where(l0 > 1e-5 * l0.max(), product / l0, 0.0)
    middle = torch.diag(own[f"{PREFIX}l"].double())
    middle.view(-1)[shared[f"{PREFIX}positions"].long()] += own[f"{PREFIX}s"].double()
    return U @ middle @ V.T - W


def alike(one: str, other: str) -> bool:
    return [p for p in one.split(".") if not p.isdigit()] == [p for p in other.split(".") if not p.isdigit()]


def errors(source: Path, made: Path, model: Any) -> dict[str, float]:
    found = {}
    for name in load_file(source / WEIGHTS):
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            dW = dense(source, module)
            found[module] = float((dW - frod_dense(made, model, module)).norm() / dW.norm())
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "llama-bf16-sharded"])
def test_the_stated_error_is_the_true_one_and_the_adapter_opens(kind: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    base = load_base(folder)
    trained(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), tmp_path / "source")
    _, report = surgery.convert(
        tmp_path / "source", "frod", tmp_path / "out", base=folder, accept_loss=True, dtype="float32"
    )
    model = load_base(folder)
    true = errors(tmp_path / "source", tmp_path / "out", model)
    assert {site.module: site.weight_error for site in report.sites} == pytest.approx(true, rel=1e-2)
    assert report.reload_difference == 0 and 0.5 < report.weight_error < 1
    # PEFT's layers compute that same change. In float64: an ill-conditioned V makes more of rounding than of a mistake.
    opened = PeftModel.from_pretrained(load_base(folder).double(), tmp_path / "out").double().eval()
    model = model.double()
    for module in true:
        weight = model.get_submodule(module).weight
        change = frod_dense(tmp_path / "out", load_base(folder), module)
        weight.data += change.T if type(model.get_submodule(module)).__name__ == "Conv1D" else change
    inputs = model_inputs(kind.removesuffix("-bf16-sharded"))
    with torch.no_grad():
        found, wanted, plain = (output(m, inputs) for m in (opened, model, load_base(folder).double()))
    assert relative_difference(found, wanted) < 1e-4
    assert relative_difference(plain, wanted) > 1e-2


def test_a_role_of_one_layer_that_leaves_outputs_alone(llama: Path, tmp_path: Path) -> None:
    """One layer is adapted, and of its outputs not all: its B has zeros."""
    config = LoraConfig(r=4, target_modules=["layers.1.self_attn.q_proj"], task_type="CAUSAL_LM")
    trained(load_base(llama), config, tmp_path / "source")

    def leave_alone(tensors: dict[str, torch.Tensor]) -> None:
        (name,) = (name for name in tensors if ".lora_B." in name)
        tensors[name][:3] = 0

    edit_tensors(tmp_path / "source", leave_alone, WEIGHTS)
    options = {"base": llama, "accept_loss": True, "dtype": "float32", "size": 8_000}
    _, report = surgery.convert(tmp_path / "source", "frod", tmp_path / "out", **options)
    true = errors(tmp_path / "source", tmp_path / "out", load_base(llama))
    assert {site.module: site.weight_error for site in report.sites} == pytest.approx(true, rel=1e-2)
    assert [name.rpartition(".")[2] for name in true] == ["q_proj"] and max(true.values()) < 1
    assert "most of the weights' change" in report.notes[0]
    assert 7_800 < report.bytes <= 8_000


def test_what_lies_in_the_family_is_found(llama: Path, tmp_path: Path) -> None:
    """Positions and values of a trained FRoD, from its weight change alone."""
    adapter, _ = surgery.init(llama, "frod", None, sparse_rate=0.02)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in adapter.tensors.items():
        if name.endswith("_l"):
            tensor.mul_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
        if name.endswith("_s"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    adapter.save(tmp_path / "source")
    size = (tmp_path / "source" / WEIGHTS).stat().st_size
    made, report = surgery.convert(tmp_path / "source", "frod", None, base=llama, size=size)
    assert report.weight_error < 1e-3
    for name, tensor in adapter.tensors.items():
        if name.endswith("positions"):
            assert torch.equal(made.tensors[name].sort().values, tensor.sort().values)
        if name.endswith(("_l", "_s")):
            torch.testing.assert_close(made.tensors[name], tensor, atol=5e-3, rtol=5e-3)
    # A control: with half of the entries it is not.
    assert surgery.convert(tmp_path / "source", "frod", None, base=llama)[1].weight_error > 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_budget_in_bytes_is_met_and_filled(dtype: str, lora: Path, llama: Path, tmp_path: Path) -> None:
    limit = 40_000 if dtype == "float32" else 25_000
    made, report = surgery.convert(
        lora, "frod", tmp_path / "out", base=llama, size=limit, dtype=dtype, accept_loss=True
    )
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == report.bytes <= limit
    counts = {name: tensor.numel() for name, tensor in made.tensors.items() if name.endswith("positions")}
    assert len(counts) == 3 and min(counts.values()) > 0.02 * 32 * 32
    # One more entry for each role: its place, and a value in each of three layers.
    itemsize = 4 if dtype == "float32" else 2
    assert report.bytes + sum(4 + 3 * itemsize for _ in counts) > limit - 8
    with pytest.raises(MethodError, match=r"is (\d+) bytes") as error:
        surgery.convert(lora, "frod", None, base=llama, size=10_000, dtype=dtype)
    smallest = int(str(error.value).split(", is ")[1].split()[0])
    _, least = surgery.convert(lora, "frod", None, base=llama, size=smallest, dtype=dtype, accept_loss=True)
    assert least.bytes <= smallest and least.weight_error > report.weight_error


def test_half_precision_keeps_the_difference_of_l_and_l0(lora: Path, llama: Path, tmp_path: Path) -> None:
    made, report = surgery.convert(lora, "frod", tmp_path / "half", base=llama, dtype="bfloat16", accept_loss=True)
    _, whole = surgery.convert(lora, "frod", None, base=llama, accept_loss=True)
    assert {made.tensors[name].dtype for name in made.tensors if name.endswith(("_l", "_l0"))} == {torch.float32}
    assert {made.tensors[name].dtype for name in made.tensors if name.endswith(("_V", "_s"))} == {torch.bfloat16}
    assert report.weight_error == pytest.approx(whole.weight_error, rel=0.02)
    true = errors(lora, tmp_path / "half", load_base(llama))
    assert {site.module: site.weight_error for site in report.sites} == pytest.approx(true, rel=1e-2)


def test_layers_without_a_change_leave(lora: Path, llama: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / WEIGHTS)
    gone = "model.layers.0.self_attn.q_proj"  # the one that would store what its role shares
    tensors[f"base_model.model.{gone}.lora_B.weight"].zero_()
    deficient = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    deficient[:, 1:] = deficient[:, :1]
    save_file(tensors, lora / WEIGHTS, metadata={"format": "pt"})
    made, report = surgery.convert(lora, "frod", tmp_path / "out", base=llama, accept_loss=True)
    assert report.modules == 8 and gone not in made.config["target_modules"]
    PeftModel.from_pretrained(load_base(llama), tmp_path / "out")
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()
    save_file(tensors, lora / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MethodError, match="changes nothing"):
        surgery.convert(lora, "frod", None, base=llama)


def test_heads_are_carried_bit_for_bit(model_folder, tmp_path: Path) -> None:
    base = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=5)
    source = get_peft_model(base, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", bias="lora_only"))
    randomise(source)
    source.save_pretrained(tmp_path / "source")
    made, _ = surgery.convert(
        tmp_path / "source", "frod", tmp_path / "out", base=model_folder("bert"), accept_loss=True
    )
    old, new = (load_file(tmp_path / folder / WEIGHTS) for folder in ("source", "out"))
    carried = [name for name in old if "lora_" not in name]
    assert len(carried) == 4 and all(torch.equal(old[name], new[name]) for name in carried)
    assert made.config["bias"] == "adapter_only"


def test_data_makes_the_outputs_better(lora: Path, tmp_path: Path) -> None:
    report, found, without = output_errors(lora, "frod", frod_dense, tmp_path)
    assert report.output_error == pytest.approx(found, rel=1e-2)
    assert found < 0.95 * without
    assert "most of the layers' outputs on the data" in report.notes[0]


def test_refusals(lora: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="--base"):
        surgery.convert(lora, "frod", tmp_path / "out")
    with pytest.raises(MethodError, match=r"keeps .*of the change's squared norm.*--to giva.*--accept-loss"):
        surgery.convert(lora, "frod", tmp_path / "out", base=llama)
    for budget in ({"rank": 4}, {"energy": 0.9}, {"max_error": 0.5}):
        with pytest.raises(MethodError, match="frod takes --size or --ratio"):
            surgery.convert(lora, "frod", tmp_path / "out", base=llama, accept_loss=True, **budget)
    assert not (tmp_path / "out").exists()


def test_it_is_bound_to_its_base(lora: Path, tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    surgery.convert(lora, "frod", tmp_path / "out", base=base, accept_loss=True)
    edit_tensors(base, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].mul_(1.01))
    with pytest.raises(WrongBaseError):
        surgery.convert(tmp_path / "out", "lora", None, base=base, rank=4)
