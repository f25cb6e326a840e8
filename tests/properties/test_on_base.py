"""Properties beside a base model: it stays as it is, and merging and converting can change places."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel

import surgery
from surgery.adapters.adapter import Adapter
from tests.helpers.conversions import trained
from tests.helpers.models import load_base, model_inputs, output, relative_difference, start_options
from tests.properties.examples import SEEDS, examples, generator

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
FORMS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "giva": {"ratio": 12},
    "vera": {"energy": 0.8},
    "frod": {"accept_loss": True},
    "smoa": {"accept_loss": True},
}
METHODS = ["vera", "giva", "inilora", "inilora-alpha", "frod", "smoa"]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def source_of(kind: str, folder: Path, out: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[kind], task_type="CAUSAL_LM")
    return trained(load_base(folder), config, out)


def says(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return output(model.eval(), model_inputs(kind))


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The base's parameters in a live model, wherever the adapter has put them."""
    own = {name.replace(".base_layer", "").replace(".linear.", "."): p for name, p in model.named_parameters()}
    return {name.removeprefix("base_model.model."): p.detach().clone() for name, p in own.items()}


@pytest.mark.parametrize("method", METHODS)
def test_starting_and_training_leave_the_base_as_it_is(method: str, llama: Path, tmp_path: Path) -> None:
    before = digests(llama)
    options = {"rank": 4} if method not in {"frod"} else {}
    surgery.init(llama, method, tmp_path / "start", **options, **start_options(method, "llama"))
    assert digests(llama) == before
    base = weights_of(load_base(llama))
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "start", is_trainable=True)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=0.5)
    plain = says(load_base(llama), "llama")
    assert relative_difference(says(model, "llama"), plain) <= 1e-6
    for _ in range(2):
        optimizer.zero_grad()
        output(model.train(), model_inputs("llama")).square().mean().backward()
        optimizer.step()
    found = weights_of(model)
    assert all(torch.equal(found[name], weight) for name, weight in base.items())
    assert relative_difference(says(model, "llama"), plain) > 1e-4  # the control: it was trained
    model.save_pretrained(tmp_path / "trained")
    surgery.merge(tmp_path / "trained", llama, tmp_path / "merged")
    assert relative_difference(says(load_base(tmp_path / "merged"), "llama"), says(model, "llama")) <= 1e-4
    assert digests(llama) == before


def test_a_live_model_is_left_as_it_was(llama: Path) -> None:
    model = load_base(llama).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    surgery.init(model, "giva", rank=4, **start_options("giva", "llama"))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted and model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("to", FORMS)
def test_merging_what_was_converted_is_what_the_converted_adapter_says(
    to: str, kind: str, model_folder, tmp_path: Path
) -> None:
    """`merge(convert(x))` against the live converted adapter, and no call touches base or source."""
    folder = model_folder(kind)
    source = source_of(kind, folder, tmp_path / "source")
    before = digests(folder), digests(source)
    _, report = surgery.convert(source, to, tmp_path / "made", base=folder, dtype=None, **FORMS[to])
    surgery.merge(tmp_path / "made", folder, tmp_path / "merged")
    live = says(PeftModel.from_pretrained(load_base(folder), tmp_path / "made"), kind)
    assert relative_difference(says(load_base(tmp_path / "merged"), kind), live) <= 2e-5
    compared = surgery.compare(source, tmp_path / "made", base=folder)
    assert compared.weight_error == pytest.approx(report.weight_error, rel=1e-2)
    assert (digests(folder), digests(source)) == before
    # A control: the lossy result does not say what the source says.
    assert relative_difference(live, says(PeftModel.from_pretrained(load_base(folder), source), kind)) > 1e-3


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(
    ("to", "options"), [("lora", {}), ("giva", {"bits": 32, "energy": 1}), ("vera", {"energy": 1})]
)
def test_an_exact_conversion_merges_to_the_same_model(
    to: str, options: dict[str, Any], kind: str, model_folder, tmp_path: Path
) -> None:
    folder = model_folder(kind)
    source = source_of(kind, folder, tmp_path / "source")
    surgery.convert(source, to, tmp_path / "made", base=folder, **options)
    for name in ("source", "made"):
        surgery.merge(tmp_path / name, folder, tmp_path / f"{name}-merged")
    states = [load_base(tmp_path / f"{name}-merged").state_dict() for name in ("source", "made")]
    for name, wanted in states[0].items():
        assert torch.allclose(states[1][name], wanted, atol=2e-6 * float(wanted.abs().max()))
    changed = load_base(folder).state_dict()
    assert any(not torch.equal(changed[name], wanted) for name, wanted in states[0].items())


def moved(method: str, folder: Path, seed: int) -> Adapter:
    """A start of ours whose trained tensors have moved."""
    adapter, _ = surgery.init(
        folder, method, target=["q_proj", "down_proj"], **({} if method == "frod" else {"rank": 4})
    )
    draws = generator(seed)
    for name in adapter.tensors:
        if name.endswith(("lambda_b", "lambda_d", "inilora_A", "inilora_B", "smoa_A", "smoa_B", "portable_l")):
            value = adapter.tensors[name]
            adapter.tensors[name] = value + 0.2 * torch.randn(value.shape, generator=draws)
    return adapter


@given(st.sampled_from(["vera", "inilora"]), SEEDS)
@examples(6)
def test_thin_types_go_to_lora_and_to_vera_and_back(llama: Path, method: str, seed: int) -> None:
    """VeRA -> LoRA -> VeRA at an energy of one, and IniLoRA by the same road, are the same changes in the model."""
    source = moved(method, llama, seed)
    thin, first = surgery.convert(source, "lora", base=llama)
    wide, second = surgery.convert(thin, "vera", base=llama, energy=1.0)
    assert max(first.weight_error, second.weight_error) <= 1e-6
    assert surgery.compare(source, wide, base=llama).weight_error <= 2e-6


@given(st.sampled_from(["frod", "smoa"]), SEEDS)
@examples(6)
def test_the_choice_of_factors_does_not_matter_to_fits_on_a_base(llama: Path, to: str, seed: int) -> None:
    """`B R`, `R^-1 A` of every layer: the fitted adapter computes the same change."""
    draws = generator(seed)
    shapes = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 48)}
    plain: dict[str, torch.Tensor] = {}
    turned: dict[str, torch.Tensor] = {}
    for module, (out, width) in shapes.items():
        B, A = torch.randn(out, 3, generator=draws), torch.randn(3, width, generator=draws)
        R = torch.linalg.qr(torch.randn(3, 3, generator=draws))[0] * torch.tensor([0.4, 1.0, 2.5])
        name = f"base_model.model.{module}.lora_"
        plain |= {f"{name}A.weight": A, f"{name}B.weight": B}
        turned |= {f"{name}A.weight": torch.linalg.inv(R) @ A, f"{name}B.weight": B @ R}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": sorted(shapes)}
    one, other = (
        surgery.convert(Adapter(config, tensors), to, base=llama, accept_loss=True)[0] for tensors in (plain, turned)
    )
    assert surgery.compare(one, other, base=llama).weight_error <= 1e-3
    # A control: another change is fitted by another adapter.
    wrong = {name: value if "lora_A" in name else 2 * value for name, value in plain.items()}
    far = surgery.convert(Adapter(config, wrong), to, base=llama, accept_loss=True)[0]
    assert surgery.compare(one, far, base=llama).weight_error > 0.1
