"""Types that are read through PEFT: every verb does what PEFT's own layers and its merge do."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import surgery
from surgery.adapters.types.through_peft import THROUGH_PEFT
from surgery.errors import AdapterError
from tests.helpers.kinds import base_of, trained, verbs
from tests.helpers.models import edit_tensors, load_base
from tests.helpers.through_peft import KINDS

FILE = "adapter_model.safetensors"
# Base -> targets: without biases, and with them.
TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "bert": ["query", "value", "intermediate.dense"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", KINDS)
def test_as_peft_has_it(name: str, kind: str, tmp_path: Path) -> None:
    config, settings = KINDS[name]
    base = base_of(kind, tmp_path / "base")
    trained(base, tmp_path / "made", config(target_modules=TARGETS[kind], **settings))
    if (name, kind) == ("ROAD", "bert"):
        with pytest.raises(AdapterError, match="RoAd adapter changes the layer's own bias, too; merge it with PEFT"):
            surgery.merge(tmp_path / "made", base, tmp_path / "merged")
        return
    found = dict(verbs(kind, base, tmp_path / "made", tmp_path, ("giva",)))
    assert found["load"] == 0 and found["merge"] < 2e-5, found
    assert max(found.values()) < 5e-4, found  # full rank at an energy of 1
    state = torch.random.get_rng_state()
    assert surgery.compare(tmp_path / "made", tmp_path / "made", base=base).weight_error == 0
    assert torch.equal(state, torch.random.get_rng_state())
    inspected = surgery.inspect(tmp_path / "made", base=base)
    assert all(site.norm for site in inspected.sites) and not any("not read" in note for note in inspected.notes)


@pytest.mark.filterwarnings("ignore")
def test_dense_change_is_that_of_pefts_merge(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    model = trained(base, tmp_path / "made", peft.FourierFTConfig(n_frequency=30, target_modules=["q_proj"]))
    before, merged = load_base(base), model.merge_and_unload()
    adapter = surgery.Adapter.open(tmp_path / "made")
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"):
        weight = before.get_submodule(module).weight.detach()
        want = merged.get_submodule(module).weight.detach() - weight
        assert torch.allclose(adapter.delta(module, weight).dense(), want, atol=1e-5)
    with pytest.raises(AdapterError, match="FourierFT layer depends on its base weight"):
        adapter.delta("model.layers.0.self_attn.q_proj")
    with pytest.raises(AdapterError, match="depends on its base model: give it with --base"):
        surgery.convert(adapter, "giva")


@pytest.mark.filterwarnings("ignore")
def test_broken_files_are_named(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    trained(base, tmp_path / "made", peft.GraloraConfig(r=4, gralora_k=2, target_modules=["q_proj"]))
    name = "base_model.model.model.layers.1.self_attn.q_proj.gralora_B"
    edit_tensors(tmp_path / "made", lambda tensors: tensors.pop(name), FILE)
    with pytest.raises(AdapterError, match=r"lacks .*layers.1.self_attn.q_proj.gralora_B|lacks .*gralora"):
        surgery.merge(tmp_path / "made", base, tmp_path / "merged")
    trained(base, tmp_path / "other", peft.MissConfig(r=4, target_modules=["q_proj"]))

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            tensors[key] = tensors[key][:, :3].clone()

    edit_tensors(tmp_path / "other", cut, FILE)
    with pytest.raises(AdapterError, match=r"PEFT cannot compute its MiSS change .*size mismatch"):
        surgery.merge(tmp_path / "other", base, tmp_path / "merged")


def test_every_type_of_the_table_is_tested() -> None:
    assert set(THROUGH_PEFT) == {name.partition(" ")[0] for name in KINDS}
