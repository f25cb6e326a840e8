"""A model that carries an adapter for the time of a block computes what PEFT's does, tied weights included."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel

import surgery
from surgery.adapters.source import Source
from surgery.converters.calibration import Calibration, carried_in
from surgery.deltas.operators import LowRank
from surgery.errors import AdapterError
from surgery.models.base_model import BaseModel
from surgery.passes.examples import Examples
from surgery.passes.fidelity import Applied, fidelity
from surgery.passes.hooks import applied
from surgery.passes.moments import gather_moments
from tests.helpers.merges import outputs, tied_llama, trained
from tests.helpers.models import load_base, ragged, relative_difference

CASES: dict[str, dict[str, Any]] = {
    "copy of the head": {"modules_to_save": ["lm_head"]},
    "copy of the embeddings": {"modules_to_save": ["embed_tokens"]},
    "copies of both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one copy for both": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "LoRA on the head": {"target_modules": ["q_proj", "down_proj", "lm_head"]},
}


@pytest.fixture(params=CASES)
def tied(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A Llama whose head is its embedding, and a LoRA that changes one or both of the two."""
    base = tied_llama(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "down_proj"], **CASES[request.param]}
    )
    return base, trained(load_base(base), config, tmp_path / "adapter")


def source_on(base: Path, adapter: Path) -> Source:
    return Source.open(surgery.Adapter.open(adapter), BaseModel.open(base), torch.device("cpu"))


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


def test_calibration_measures_the_model_that_peft_makes(tied: tuple[Path, Path]) -> None:
    base, adapter = tied
    source = source_on(base, adapter)
    examples = ragged("llama")
    calibration = Calibration(load_base(base), source, examples, batch_size=2)
    given = calibration.moments_of(source.sites)
    found = {site: moments for site, moments in given.items() if moments is not None}
    assert len(found) == len(source.sites)
    reference = PeftModel.from_pretrained(load_base(base), adapter).eval().get_base_model()
    expected = gather_moments(reference, calibration.feed(), list(source.sites))
    for site, moments in found.items():
        wanted = expected[site.module]
        assert relative_difference(moments.F, wanted.F) < 1e-4, site.module
        # A first token's query has one key to choose from: rounding decides whether the loss feels it.
        assert "q_proj" in site.module or relative_difference(moments.C, wanted.C) < 1e-4, site.module
    # A control: the bare model's are others.
    bare = gather_moments(load_base(base), calibration.feed(), list(source.sites))
    assert max(relative_difference(found[site].F, bare[site.module].F) for site in found) > 0.1


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
