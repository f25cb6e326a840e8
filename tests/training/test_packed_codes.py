"""Packed codes learn in no more bytes than they had."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import surgery
from surgery.deltas.operators import LowRank
from surgery.training.interruption import TrainingInterrupted
from surgery.training.packed_codes import CodeTraining
from surgery.training.preparing import prepare
from tests.helpers.training_distilled import learnt, prepared, some


def test_codes_learn_in_no_more_bytes(packed: Path, taught_place: Path, tmp_path: Path) -> None:
    source = surgery.Adapter.open(packed)
    _, report = learnt(packed, taught_place, tmp_path / "out")
    written = surgery.Adapter.open(tmp_path / "out")
    assert report.bytes <= report.source_bytes == (packed / "adapter_model.safetensors").stat().st_size
    assert report.trained == ["giva_A", "giva_B", "giva_s"]
    assert report.after.kl < 0.7 * report.before.kl and report.after.hidden < report.before.hidden
    moved = {name.rpartition(".")[2] for name, t in written.tensors.items() if not torch.equal(t, source.tensors[name])}
    assert moved & {"giva_A", "giva_B"}
    assert moved <= {"giva_A", "giva_B", "giva_s"}, "o and the head are as they were"
    for name, tensor in written.tensors.items():
        if name.endswith(("giva_A", "giva_B")):
            assert torch.equal(tensor, tensor.round())
    student = prepared("bert", taught_place).base  # what is in the file answers as was measured
    found = surgery.compare(
        taught_place / "bert-teacher",
        tmp_path / "out",
        base=taught_place / "bert",
        data=taught_place / "texts.jsonl",
        latency=False,
    )
    assert student is not None and found.kl == pytest.approx(report.after.kl, rel=1e-3)


def test_scales_alone(packed: Path, taught_place: Path) -> None:
    source = surgery.Adapter.open(packed)
    trained, report = learnt(packed, taught_place, only=["giva_s"])
    assert report.trained == ["giva_s"] and report.bytes <= report.source_bytes
    assert report.after.kl <= report.before.kl
    moved = {n.rpartition(".")[2] for n, t in trained.tensors.items() if not torch.equal(t, source.tensors[n])}
    assert moved <= {"giva_s"}


def test_gradients_pass_through_the_rounding(packed: Path, taught_place: Path) -> None:
    """As if it were not there: the gradient of the codes is that of plain factors with the same values."""
    found = prepare(surgery.Adapter.open(packed), taught_place / "bert")
    found.model.eval()
    batch = some("bert", taught_place, found.base)
    codes = CodeTraining(found.model)
    with codes.attached(found.model):
        found.model(**batch).logits.square().sum().backward()
    name, layer, factors = next(iter(codes.pairs))
    A, B, s = (layer.all_tensors("default")[short].detach().clone() for short in "ABs")
    plain = {"A": A.requires_grad_(), "B": B.requires_grad_()}
    layer.delta = lambda adapter, **options: LowRank(plain["B"], s[:, None] * plain["A"])
    found.model(**batch).logits.square().sum().backward()
    torch.testing.assert_close(factors.A.grad, plain["A"].grad * factors.in_A, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(factors.B.grad, plain["B"].grad * factors.in_B, rtol=1e-3, atol=1e-6)
    assert name in layer.site.module


def test_what_does_not_fit_is_taken_back(packed: Path, taught_place: Path) -> None:
    """The codes that have moved least first; where nothing else helps, all of them."""
    found = prepare(surgery.Adapter.open(packed), taught_place / "bert")
    codes = CodeTraining(found.model)
    before = codes.tensors()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, _, factors in codes.pairs:
            factors.A += 2 * torch.randn(factors.A.shape, generator=generator)

    def changes(tensors: dict[str, torch.Tensor]) -> int:
        return sum(int((tensor != before[name]).sum()) for name, tensor in tensors.items() if name.endswith("A"))

    free = codes.tensors()
    half = codes.fit(changes, changes(free) // 2)
    assert 0.3 * changes(free) < changes(half) <= changes(free) // 2
    for name, tensor in half.items():
        kept = (tensor - before[name]).abs()[tensor != before[name]]
        undone = (free[name] - before[name]).abs()[(tensor == before[name]) & (free[name] != before[name])]
        assert not len(kept) or not len(undone) or kept.min() >= undone.max() - 1
    nothing = codes.fit(changes, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in nothing.items() if name.endswith("A"))


def test_codes_go_on_after_an_interruption(packed: Path, taught_place: Path, tmp_path: Path) -> None:
    options = {"save_every": 5, "steps": 30}
    whole, _ = learnt(packed, taught_place, tmp_path / "whole", **options)

    def stop(step: int, steps: int, what: str) -> None:
        if step == 12:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        learnt(packed, taught_place, tmp_path / "out", progress=stop, **options)
    resumed, _ = learnt(packed, taught_place, tmp_path / "out", resume=True, **options)
    apart = sum(int((tensor != whole.tensors[name]).sum()) for name, tensor in resumed.tensors.items())
    assert apart <= 0.002 * sum(tensor.numel() for tensor in whole.tensors.values())
