"""Tensors that are made when they are asked for."""

from __future__ import annotations

import torch

from surgery.system.tensors import MadeTensors, planned, whole


def test_what_is_made_is_made_anew_and_let_go_of() -> None:
    asked, gone = [], []

    def make(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.full((2,), float(len(asked)))

    tensors = MadeTensors({"made": torch.empty(2, device="meta"), "there": torch.ones(3)}, make, gone.append)
    assert list(tensors) == ["made", "there"] and len(tensors) == 2 and "made" in tensors and not asked
    assert planned(tensors)["made"].shape == (2,) and planned(tensors)["made"].is_meta and not asked
    assert tensors["made"].tolist() == [1, 1] and tensors["made"].tolist() == [2, 2]
    assert tensors["there"] is planned(tensors)["there"] and asked == ["made"] * 2
    found = whole(tensors)
    assert found["made"].tolist() == [3, 3] and gone == ["made"] and not tensors
    tensors["made"] = torch.zeros(1)
    del tensors["made"]
    assert gone == ["made"]  # it was another one


def test_a_dictionary_stays_one() -> None:
    tensors = {"a": torch.ones(1)}
    assert planned(tensors) is tensors and whole(tensors) == tensors and whole(tensors) is not tensors
