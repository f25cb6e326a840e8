"""Time and memory of an adapter, loaded into its base."""

from __future__ import annotations

import itertools
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.comparison.cost import bytes_of, loaded_cost
from tests.helpers.comparisons import FILE, start
from tests.helpers.merges import trained
from tests.helpers.models import build, load_base


def test_costs(pair, llama: Path, texts: Path) -> None:
    """Times are per token; memory is what PEFT's layers hold, one form at a time on the same model."""
    a, b = pair
    costs = surgery.compare(a, b, base=llama, data=texts, batch_size=4).latency
    assert costs is not None and costs.unit == "token" and costs.batch_size == 4
    assert costs.base.bytes == bytes_of(load_base(llama))
    for cost, folder in ((costs.a, a), (costs.b, b)):
        assert cost.bytes == sum(tensor.nbytes for tensor in load_file(folder / FILE).values())
    assert all(0 < cost.batch < 1 and 0 < cost.one < 1 for cost in (costs.base, costs.a, costs.b))


def test_times_are_medians_for_each_token(pair, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock under control: of six runs the first does not count, and the others' median is 2, their mean 2.4."""
    seconds = itertools.cycle([9.0, 1.0, 2.0, 3.0, 5.0, 1.0])
    monkeypatch.setattr("surgery.comparison.cost._timed", lambda model, inputs: next(seconds))
    model = load_base(llama)
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
    cost = loaded_cost(model, None, [(batch, 10), (batch, 10)])
    assert cost.one == cost.batch == 0.2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded_cost(model, surgery.Adapter.open(pair[0]), [(batch, 10), (batch, 10)])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # taken off again
    assert before.keys() == model.state_dict().keys()


def test_costs_of_types_that_are_unpacked_in_memory(llama: Path, texts: Path, tmp_path: Path) -> None:
    """A compact file is not a small adapter in memory: a base that is not stored is regenerated there."""
    bare = start("frod", llama, tmp_path / "bare", store=False)
    vera = trained(load_base(llama), peft.VeraConfig(r=16, save_projection=False, target_modules=["q_proj"]),
                   tmp_path / "vera")  # fmt: skip
    found = surgery.compare(bare, vera, base=llama, data=texts)
    for cost, size in ((found.latency.a, found.source_bytes), (found.latency.b, found.bytes)):
        assert cost.bytes > size


def test_memory_is_counted_once_for_tensors_of_several_names() -> None:
    model = build("t5")  # its embeddings are shared
    assert bytes_of(model) == sum(parameter.nbytes for parameter in model.parameters())
