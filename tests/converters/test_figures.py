"""The figures of a conversion are those of the naive formulas, and cost one reading of each adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import surgery
from surgery.adapters.adapter import Adapter
from surgery.adapters.source import Source
from surgery.converters import figures as conversion_figures
from surgery.converters.figures import converted_sites, largest_difference, squared_norms
from surgery.converters.request import Result
from surgery.deltas.operators import Delta, LowRank
from tests.helpers.conversions import trained
from tests.helpers.models import load_base

# Out, in, ranks of old and new: thin, flat, wider than a block of columns, and layers of one number.
SHAPES = [(1, 1, 1, 1), (30, 17, 4, 3), (17, 30, 5, 0), (1, 23, 1, 2), (23, 1, 3, 1), (16, 16, 16, 16)]


class Dense(Delta):
    """A change without thin factors."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T

    def dense(self) -> torch.Tensor:
        return self.matrix


def low_rank(rows: int, columns: int, rank: int, generator: torch.Generator) -> LowRank:
    B, A = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return LowRank(B, A, 0.7)


@pytest.mark.parametrize("forms", ["both thin", "old thin", "new thin", "neither thin"])
@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_squared_norms(shape, metric: bool, forms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_figures, "AT_A_TIME", 7)
    rows, columns, rank, other = shape
    generator = torch.Generator().manual_seed(1)
    old, new = (low_rank(rows, columns, r, generator) for r in (rank, other))
    x = torch.randn(5, columns, generator=generator)
    C = x.T @ x / 5 if metric else None
    W, V = old.dense().double(), new.dense().double()
    wide = C.double() if C is not None else torch.eye(columns, dtype=torch.float64)
    expected = [float(torch.trace(each @ wide @ each.T)) for each in (W, W - V)]
    ours: Delta = Dense(old.dense()) if forms in {"new thin", "neither thin"} else old
    theirs: Delta = Dense(new.dense()) if forms in {"old thin", "neither thin"} else new
    assert squared_norms(ours, theirs, C) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert squared_norms(ours, None, C) == pytest.approx([expected[0]] * 2, rel=1e-5)


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return trained(load_base(llama), config, tmp_path / "source")


def source_of(adapter: Adapter) -> Source:
    return Source.open(adapter, None, torch.device("cpu"))


def test_each_adapter_is_read_once(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Adapter.open(lora)
    source, made = source_of(adapter), Adapter(adapter.config, adapter.tensors)
    read: list[str] = []
    real = Adapter.delta
    monkeypatch.setattr(Adapter, "delta", lambda self, name, weight=None: read.append(name) or real(self, name, weight))
    sites = converted_sites(source, made, Result({}, {}, {}), lambda module: None)
    assert sorted(read) == sorted(2 * source.contents.modules) and len(sites) == 6
    assert all(site.weight_error < 1e-7 and site.energy > 0.1 for site in sites)
    del read[:]
    assert largest_difference(Adapter.open(lora), adapter, source) == 0
    assert read == []


@pytest.mark.parametrize("change", ["a number", "the scale"])
def test_what_was_reopened_is_compared_with_what_was_meant(change: str, lora: Path) -> None:
    meant, found = Adapter.open(lora), Adapter.open(lora)
    name = next(name for name in found.tensors if name.endswith("lora_B.weight"))
    assert largest_difference(found, meant, source_of(meant)) == 0
    if change == "a number":
        found.tensors[name] = found.tensors[name].clone()
        found.tensors[name][0, 0] += 0.5
    else:
        found.config["lora_alpha"] = 8
    module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    W, V = (each.delta(module).dense().double() for each in (meant, found))
    expected = float((W - V).norm() / W.norm())
    assert largest_difference(found, meant, source_of(meant)) == pytest.approx(expected, rel=1e-5) and expected > 1e-3


def test_a_vera_result_without_a_base(lora: Path, tmp_path: Path) -> None:
    """Its file does not say how wide a layer is: the source does."""
    _, report = surgery.convert(lora, "vera", tmp_path / "vera", accept_loss=True)
    assert report.reload_difference == 0 and 0 < report.weight_error < 1
    made = Adapter.open(tmp_path / "vera")
    scale = next(name for name in made.tensors if name.endswith("lambda_b"))
    other = Adapter(made.config, {**made.tensors, scale: made.tensors[scale] * 2})
    assert largest_difference(other, made, source_of(Adapter.open(lora))) > 0.5
