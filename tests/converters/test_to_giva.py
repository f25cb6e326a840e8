"""Conversions to packed GiVA: errors, budgets and dtypes of codes and floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import surgery
from surgery.adapters.names import WEIGHTS_FILE
from surgery.errors import MethodError
from tests.helpers.conversions import WEIGHTS, dense, logits
from tests.helpers.models import load_base, model_inputs, output, relative_difference


def test_a_packed_adapter_is_trained_and_saved_by_peft(lora: Path, llama: Path, tmp_path: Path) -> None:
    """Codes and scales survive PEFT's own saving; o is in the file from when it is trained."""
    surgery.convert(lora, "giva", tmp_path / "giva", bits=16, ratio=2)
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "giva", is_trainable=True).eval()
    model.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / WEIGHTS_FILE).stat().st_size == (tmp_path / "giva" / WEIGHTS_FILE).stat().st_size
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    target = torch.linspace(-1, 1, output(model, model_inputs("llama")).numel())
    for _ in range(2):
        optimizer.zero_grad()
        (output(model, model_inputs("llama")).flatten() - target).square().mean().backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".giva_o." in name or ".giva_s." in name for name in moved)
    model.save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        wanted = output(model, model_inputs("llama"))
    assert relative_difference(logits(llama, tmp_path / "trained"), wanted) <= 1e-6
    surgery.convert(tmp_path / "trained", "lora", tmp_path / "lora-again")
    assert relative_difference(logits(llama, tmp_path / "lora-again"), wanted) <= 1e-5


@pytest.mark.parametrize("bits", ["auto", 8, 4, 3, 2])
def test_integers_of_few_bits_survive_and_their_error_is_the_stated_one(bits, lora, llama, tmp_path: Path) -> None:
    adapter, report = surgery.convert(lora, "giva", tmp_path / "giva", bits=bits, rank=6)
    limit = 2 ** ((8 if bits == "auto" else bits) - 1) - 1
    for name, tensor in adapter.tensors.items():
        if name.endswith(("giva_A", "giva_B")):
            assert torch.equal(tensor, tensor.round()) and float(tensor.abs().max()) <= limit
    reopened = surgery.Adapter.open(tmp_path / "giva")
    assert all(torch.equal(tensor, reopened.tensors[name]) for name, tensor in adapter.tensors.items())
    lost = total = 0.0
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "giva").eval()
    for site in report.sites:
        wanted = dense(lora, site.module)
        found = model.base_model.model.get_submodule(site.module).get_delta_weight("default").double()
        lost += float((wanted - found).square().sum())
        total += float(wanted.square().sum())
    assert report.weight_error == pytest.approx((lost / total) ** 0.5, rel=1e-2)
    assert report.weight_error < {2: 0.8, 3: 0.4, 4: 0.2, 8: 0.08, "auto": 0.08}[bits]
    assert (tmp_path / "giva" / WEIGHTS).stat().st_size == report.bytes


def test_free_codes_lose_no_more_than_any_width_does(lora: Path) -> None:
    for ratio in (5.0, 9.0, 30.0):
        errors = {bits: surgery.convert(lora, "giva", ratio=ratio, bits=bits)[1].weight_error for bits in (8, 4, 3, 2)}
        free = surgery.convert(lora, "giva", ratio=ratio)[1].weight_error
        assert free <= 1.03 * min(errors.values()) and max(errors.values()) > 1.2 * free


@pytest.mark.parametrize("limit", [0.3, 0.05, 0.003])
def test_codes_meet_an_error_in_few_bytes(limit: float, lora: Path, tmp_path: Path) -> None:
    """The stated error holds with the rounding in it; a file of a tenth less, at its least error, breaks it."""
    _, report = surgery.convert(lora, "giva", tmp_path / "giva", max_error=limit)
    assert 0.9 * limit <= report.weight_error <= limit
    _, smaller = surgery.convert(lora, "giva", size=int(report.bytes * 0.9))
    assert smaller.weight_error > limit


@pytest.mark.parametrize("energy", [0.9, 0.999])
def test_every_layer_of_codes_keeps_its_energy(energy: float, lora: Path) -> None:
    _, report = surgery.convert(lora, "giva", energy=energy)
    kept = [1 - site.weight_error**2 for site in report.sites]
    assert all(share >= energy for share in kept) and min(kept) < energy + 0.5 * (1 - energy)


def test_what_codes_cannot_hold_is_refused_or_stored_as_floats(lora: Path, llama: Path, tmp_path: Path) -> None:
    for goal in ({"energy": 0.9999}, {"max_error": 0.01}):
        with pytest.raises(MethodError, match="codes of 2 bits lose more than that: leave out --bits"):
            surgery.convert(lora, "giva", bits=2, **goal)
    for number, goal in enumerate(({"energy": 1.0}, {"max_error": 0.0})):
        _, report = surgery.convert(lora, "giva", tmp_path / f"exact-{number}", **goal)
        assert report.weight_error <= 1e-6 and {site.bits for site in report.sites} == {32.0}
        assert relative_difference(logits(llama, tmp_path / f"exact-{number}"), logits(llama, lora)) <= 1e-5


def test_trained_scales_leave_their_grid_and_are_stored_as_they_are(lora: Path, llama: Path, tmp_path: Path) -> None:
    surgery.convert(lora, "giva", tmp_path / "giva", ratio=8)
    assert set(load_file(tmp_path / "giva" / WEIGHTS)) == {"base_model.giva_codes"}
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "giva", is_trainable=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "giva_s" in name:
                parameter.mul_(torch.linspace(-1.1, 1.3, parameter.numel()))
        wanted = output(model, model_inputs("llama"))
    model.save_pretrained(tmp_path / "trained")
    assert set(load_file(tmp_path / "trained" / WEIGHTS)) == {"base_model.giva_codes", "base_model.giva_s"}
    assert torch.equal(logits(llama, tmp_path / "trained"), wanted)
    again = surgery.Adapter.open(tmp_path / "trained")
    again.save(tmp_path / "again")
    assert torch.equal(logits(llama, tmp_path / "again"), wanted)
