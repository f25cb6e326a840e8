"""SMoA from other adapters: least squares through masks, and the stated loss is the true one."""

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
from tests.helpers.smoa_reference import parts_of
from tests.helpers.stock_adapters import randomise


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Path:
    """A LoRA on some linears of the tiny grouped-query Llama."""
    torch.manual_seed(0)  # of the start of A, to which the fit's local minima are due
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"], task_type="CAUSAL_LM")
    return trained(load_base(llama), config, tmp_path / "source")


def weight_of(model: Any, module: str) -> torch.Tensor:
    layer = model.get_submodule(module)
    weight = layer.weight.detach().double()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def smoa_dense(made: Path, model: Any, module: str) -> torch.Tensor:
    """`sum_k M_k * (B_k A_k)` from the file and an exact decomposition of the base weight, float64."""
    own = surgery.Adapter.open(made).modules[module]
    W = weight_of(model, module)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    cut = int(own["smoa_cuts"])
    A, B = own["smoa_A"].double(), own["smoa_B"].double()
    first = -(-A.shape[0] // 2)
    total = torch.zeros_like(W)
    for values, ranks in ((slice(0, cut), slice(0, first)), (slice(cut, None), slice(first, None))):
        total += ((U[:, values] * S[values]) @ Vh[values]) * (B[:, ranks] @ A[ranks])
    return total


def errors(source: Path, made: Path, model: Any) -> dict[str, float]:
    found = {}
    for name in load_file(source / WEIGHTS):
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            dW = dense(source, module)
            found[module] = float((dW - smoa_dense(made, model, module)).norm() / dW.norm())
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "llama-bf16-sharded"])
def test_the_stated_error_is_the_true_one_and_the_adapter_opens(kind: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    trained(load_base(folder), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), tmp_path / "source")
    made, report = surgery.convert(tmp_path / "source", "smoa", tmp_path / "out", base=folder, accept_loss=True)
    assert made.config["r"] == 4 and made.config["groups"] == 2
    model = load_base(folder)
    true = errors(tmp_path / "source", tmp_path / "out", model)
    assert {site.module: site.weight_error for site in report.sites} == pytest.approx(true, rel=1e-2)
    assert report.reload_difference == 0 and 0.3 < report.weight_error < 1
    opened = PeftModel.from_pretrained(load_base(folder), tmp_path / "out").eval()
    for module in true:
        weight = model.get_submodule(module).weight
        change = smoa_dense(tmp_path / "out", load_base(folder), module)
        weight.data += (change.T if type(model.get_submodule(module)).__name__ == "Conv1D" else change).float()
    inputs = model_inputs(kind.removesuffix("-bf16-sharded"))
    with torch.no_grad():
        found, wanted, plain = (output(m, inputs) for m in (opened, model, load_base(folder)))
    assert relative_difference(found, wanted) < 1e-4
    assert relative_difference(plain, wanted) > 1e-2


def test_what_lies_in_the_family_is_found(llama: Path, tmp_path: Path) -> None:
    adapter, _ = surgery.init(llama, "smoa", None, rank=4, variant="components")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in adapter.tensors.items():
        if name.endswith("smoa_B"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    adapter.save(tmp_path / "source")
    _, report = surgery.convert(tmp_path / "source", "smoa", None, base=llama, rank=4)
    assert report.weight_error < 1e-3
    # A control: of half the rank it is not.
    assert (
        surgery.convert(tmp_path / "source", "smoa", None, base=llama, rank=2, accept_loss=True)[1].weight_error > 0.1
    )


def best_on_blocks(dW: torch.Tensor, W: torch.Tensor) -> float:
    """The share of a change's energy inside two diagonal blocks: what factors of any rank could hold."""
    inside = sum(dW[rows][:, columns].square().sum() for rows, columns in parts_of(W, 2))
    return float(inside / dW.square().sum())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_blocks_hold_what_lies_on_them_and_say_so(kind: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    trained(load_base(folder), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), tmp_path / "source")
    with pytest.raises(MethodError, match=r"about half.*--variant components.*--accept-loss"):
        surgery.convert(tmp_path / "source", "smoa", tmp_path / "out", base=folder, variant="blocks")
    options = {"variant": "blocks", "accept_loss": True}
    made, report = surgery.convert(tmp_path / "source", "smoa", tmp_path / "out", base=folder, rank=64, **options)
    assert (made.config["variant"], made.config["format_version"]) == ("blocks", 2)
    assert made.config["lora_alpha"] == made.config["r"] == 64 and made.provenance["format_version"] == 2
    opened = PeftModel.from_pretrained(load_base(folder), tmp_path / "out")
    reached = total = 0.0
    for site in report.sites:
        layer = opened.base_model.model.get_submodule(site.module)
        dW, found = dense(tmp_path / "source", site.module), layer.get_delta_weight("default").double()
        found = found.T if layer.fan_in_fan_out else found
        left = float((dW - found).square().sum() / dW.square().sum())
        share = best_on_blocks(dW, weight_of(load_base(folder), site.module))
        assert site.weight_error == pytest.approx(left**0.5, rel=1e-3)
        # At a rank above that of any block next to nothing inside of them is lost: where an entry of W is next to none.
        assert (1 - share) ** 0.5 * 0.999 < site.weight_error < (1 - share) ** 0.5 * 1.02
        reached, total = reached + share * float(dW.square().sum()), total + float(dW.square().sum())
    said = [note for note in report.notes if "2 diagonal blocks" in note]
    assert len(said) == 1 and f"{reached / total:.0%} of this change's energy" in said[0]
    with torch.no_grad():
        assert output(opened.eval(), model_inputs(kind)).isfinite().all()


def test_blocks_within_a_budget_and_on_data(lora: Path, llama: Path, tmp_path: Path) -> None:
    options = {"base": llama, "variant": "blocks", "accept_loss": True}
    made, report = surgery.convert(lora, "smoa", tmp_path / "out", size=9_000, **options)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == report.bytes <= 9_000
    assert surgery.convert(lora, "smoa", None, rank=made.config["r"] + 1, **options)[1].bytes > 9_000
    half = surgery.convert(lora, "smoa", None, rank=8, **{**options, "variant": None})[1]
    assert (
        surgery.convert(lora, "smoa", None, rank=8, **options)[1].trainable_parameters == half.trainable_parameters / 2
    )


def test_the_variant_belongs_to_smoa(lora: Path, llama: Path) -> None:
    for to, variant in (("giva", "blocks"), ("smoa", "rings")):
        with pytest.raises(MethodError, match=r"variant (belongs to smoa|must be components, blocks)"):
            surgery.convert(lora, to, None, base=llama, variant=variant)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_budget_in_bytes_is_met_and_filled(dtype: str, lora: Path, llama: Path, tmp_path: Path) -> None:
    limit = 20_000
    made, report = surgery.convert(
        lora, "smoa", tmp_path / "out", base=llama, size=limit, dtype=dtype, accept_loss=True
    )
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == report.bytes <= limit
    more = surgery.convert(lora, "smoa", None, base=llama, rank=made.config["r"] + 1, dtype=dtype, accept_loss=True)[1]
    assert more.bytes > limit
    true = errors(lora, tmp_path / "out", load_base(llama))
    assert {site.module: site.weight_error for site in report.sites} == pytest.approx(true, rel=1e-2)
    with pytest.raises(MethodError, match=r"is (\d+) bytes") as error:
        surgery.convert(lora, "smoa", None, base=llama, size=1000, dtype=dtype)
    smallest = int(str(error.value).split(", is ")[1].split()[0])
    _, least = surgery.convert(lora, "smoa", None, base=llama, size=smallest, dtype=dtype, accept_loss=True)
    assert least.bytes == smallest


def test_a_bfloat16_source_stays_so(lora: Path, llama: Path, tmp_path: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in load_file(lora / WEIGHTS).items()}, lora / WEIGHTS)
    made, report = surgery.convert(lora, "smoa", tmp_path / "out", base=llama, accept_loss=True)
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.bfloat16, torch.int32}
    true = errors(lora, tmp_path / "out", load_base(llama))
    assert {site.module: site.weight_error for site in report.sites} == pytest.approx(true, rel=1e-2)


def test_layers_without_a_change_leave(lora: Path, llama: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / WEIGHTS)
    gone = "model.layers.0.self_attn.q_proj"
    tensors[f"base_model.model.{gone}.lora_B.weight"].zero_()
    deficient = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    deficient[:, 1:] = deficient[:, :1]
    save_file(tensors, lora / WEIGHTS, metadata={"format": "pt"})
    made, report = surgery.convert(lora, "smoa", tmp_path / "out", base=llama, accept_loss=True)
    assert report.modules == 8 and gone not in made.config["target_modules"]
    PeftModel.from_pretrained(load_base(llama), tmp_path / "out")
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()
    save_file(tensors, lora / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MethodError, match="changes nothing"):
        surgery.convert(lora, "smoa", None, base=llama)


def test_heads_are_carried_bit_for_bit(model_folder, tmp_path: Path) -> None:
    base = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=5)
    source = get_peft_model(base, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    randomise(source)
    source.save_pretrained(tmp_path / "source")
    surgery.convert(tmp_path / "source", "smoa", tmp_path / "out", base=model_folder("bert"), accept_loss=True)
    old, new = (load_file(tmp_path / folder / WEIGHTS) for folder in ("source", "out"))
    carried = [name for name in old if "lora_" not in name]
    assert len(carried) == 2 and all(torch.equal(old[name], new[name]) for name in carried)


def test_data_makes_the_outputs_better(lora: Path, tmp_path: Path) -> None:
    report, found, without = output_errors(lora, "smoa", smoa_dense, tmp_path)
    assert report.output_error == pytest.approx(found, rel=1e-2)
    assert found < without


def test_refusals(lora: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="--base"):
        surgery.convert(lora, "smoa", tmp_path / "out")
    with pytest.raises(MethodError, match=r"keeps .*of the change's squared norm.*--to giva.*--accept-loss"):
        surgery.convert(lora, "smoa", tmp_path / "out", base=llama, rank=2)
    for budget in ({"energy": 0.9}, {"max_error": 0.5}):
        with pytest.raises(MethodError, match="--rank"):
            surgery.convert(lora, "smoa", tmp_path / "out", base=llama, accept_loss=True, **budget)
    with pytest.raises(MethodError, match="at least 2"):
        surgery.convert(lora, "smoa", tmp_path / "out", base=llama, rank=1)
    assert not (tmp_path / "out").exists()


def test_it_is_bound_to_its_base(lora: Path, tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    surgery.convert(lora, "smoa", tmp_path / "out", base=base, accept_loss=True)
    edit_tensors(base, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].mul_(1.01))
    with pytest.raises(WrongBaseError):
        surgery.convert(tmp_path / "out", "lora", None, base=base, rank=4)
