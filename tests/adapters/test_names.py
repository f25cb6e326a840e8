"""Names of tensors are sorted once for all layers."""

from __future__ import annotations

import pytest

from surgery.adapters import names as names_module
from surgery.adapters.contents import contents_of
from tests.helpers.weight_changes import many_layers


def test_names_are_sorted_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work for one layer does not grow with the others: reading all of them is linear."""
    split: list[str] = []
    real = names_module.split_name
    monkeypatch.setattr(names_module, "split_name", lambda name, kind: split.append(name) or real(name, kind))
    adapter = many_layers(50)
    for module in contents_of(adapter).modules:
        adapter.delta(module)
    assert len(split) == 100
