"""A model that carries an adapter for the time of a block computes what PEFT's does, tied weights included."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

from surgery.converters.calibration import carried_in
from surgery.deltas.operators import LowRank
from surgery.errors import AdapterError
from surgery.passes.examples import Examples
from surgery.passes.fidelity import Applied, fidelity
from surgery.passes.hooks import applied
from tests.helpers.hooked import source_on
from tests.helpers.merges import outputs, tied_llama
from tests.helpers.models import load_base, relative_difference


def test_tied_weights_come_apart_as_they_do_in_peft(tied: tuple[Path, Path]) -> None:
    base, adapter = tied
    expected = outputs(PeftModel.from_pretrained(load_base(base), adapter))
    model = load_base(base)
    before, state = outputs(model), copy.deepcopy(model.state_dict())
    source = source_on(base, adapter)
    deltas = {site.module: delta for _, site, delta in source.deltas() if site is not None}
    carried = carried_in(model, source)
    assert set(carried) == set(source.contents.carried)
    with applied(model, deltas, carried):
        assert relative_difference(outputs(model), expected) < 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model), before)
    # A control: what the adapter brings counts.
    if source.adapter.config["modules_to_save"]:
        with applied(model, deltas):
            assert relative_difference(outputs(model), expected) > 0.03


def test_what_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = load_base(tied_llama(tmp_path / "base"))
    before = outputs(model)
    good = {"lm_head.weight": torch.zeros(61, 32)}
    for bad in (
        {"lm_head.weight": torch.zeros(3, 3)},
        {"lm_head.bias": torch.zeros(61)},
        {"no.weight": torch.zeros(1)},
    ):
        name = next(iter(bad))
        with pytest.raises(AdapterError, match=name.replace(".", r"\.")), applied(model, {}, {**good, **bad}):
            pass
        assert torch.equal(outputs(model), before)


def test_a_layer_that_is_called_by_keyword() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=self.fc(input=x)[:, None])

    model = Model()
    delta = LowRank(torch.ones(2, 1), torch.tensor([[1.0, 2.0, 3.0]]))
    x = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 2.0]])
    before = model(x).last_hidden_state
    with torch.no_grad(), applied(model, {"fc": delta}):
        assert torch.allclose(model(x).last_hidden_state - before, torch.tensor([6.0, 6.0])[:, None, None])
    found = fidelity(
        model, Examples([{"x": row} for row in x], [1, 1], {}), Applied({"fc": delta}), Applied(), layers=True
    )
    assert found.layers["fc"].energy == found.layers["fc"].lost == 2 * (6**2 + 6**2)
