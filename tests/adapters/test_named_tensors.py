"""Tests of the dictionary of tensors that knows when a name comes or goes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from surgery.adapters.adapter import Adapter
from surgery.adapters.named_tensors import NamedTensors

ONE = torch.ones(1)
CHANGES: dict[str, Callable[[NamedTensors], object]] = {
    "set": lambda t: t.__setitem__("new", ONE),
    "delete": lambda t: t.__delitem__("old"),
    "pop": lambda t: t.pop("old"),
    "popitem": lambda t: t.popitem(),
    "clear": lambda t: t.clear(),
    "setdefault": lambda t: t.setdefault("new", ONE),
    "update": lambda t: t.update({"new": ONE}),
    "update by keyword": lambda t: t.update(new=ONE),
    "or": lambda t: t.__ior__({"new": ONE}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_name_that_comes_or_goes_changes_the_version(change: str) -> None:
    tensors = NamedTensors({"old": ONE})
    before = tensors.version
    CHANGES[change](tensors)
    assert set(tensors) != {"old"}
    assert tensors.version != before


def test_another_tensor_of_a_name_does_not() -> None:
    tensors = NamedTensors({"old": ONE})
    before = tensors.version
    tensors["old"] = torch.zeros(1)
    assert tensors.setdefault("old", ONE) is tensors["old"]
    assert tensors.version == before


def test_copies_hold_the_same() -> None:
    tensors = NamedTensors({"old": ONE})
    for made in (copy.deepcopy(tensors), pickle.loads(pickle.dumps(tensors)), copy.copy(tensors)):
        assert list(made) == ["old"] and torch.equal(made["old"], ONE)


class _Counted(NamedTensors):
    looks = 0

    def __iter__(self):
        type(self).looks += len(self)
        return super().__iter__()


@pytest.mark.parametrize("layers", [50, 400])
def test_a_look_at_each_layer_does_not_go_through_all_names(layers: int) -> None:
    tensors = {
        f"base_model.model.layers.{layer}.q_proj.lora_{part}.weight": torch.ones(1, 1)
        for layer in range(layers)
        for part in "AB"
    }
    adapter = Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, tensors)
    adapter._tensors = _Counted(tensors)
    adapter._sorted = None
    _Counted.looks = 0
    for layer in range(layers):
        assert len(adapter.layer(f"layers.{layer}.q_proj")) == 2
        adapter.delta(f"layers.{layer}.q_proj")
    assert 0 < _Counted.looks <= 4 * len(tensors)


def test_layers_follow_tensors_that_are_added() -> None:
    adapter = Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, {})
    assert adapter.layer("q") == {}
    adapter.tensors["base_model.model.q.lora_A.weight"] = torch.ones(1, 2)
    assert list(adapter.layer("q")) == ["lora_A.weight"]
    adapter.tensors = {}
    assert adapter.layer("q") == {}
