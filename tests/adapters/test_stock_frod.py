"""Stock PEFT FROD folders, opened with the U that belongs to their V."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import FrodConfig, PeftModel, get_peft_model

import surgery
from surgery.adapters.stock_frod import _refuse_rounding
from surgery.models.sites import Site
from tests.helpers.models import load_base, model_inputs, output, relative_difference

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "mlp.c_fc"], "bert": ["query", "output.dense"]}


def stock(folder: Path, kind: str, **changes):
    """PEFT's own FRoD on a tiny model."""
    config = FrodConfig(target_modules=TARGETS[kind], progressbar=False, sparse_rate=0.05, **changes)
    return get_peft_model(load_base(folder), config).eval()


def train_a_little(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                size = 0.1 * float(parameter.abs().max().clamp_min(0.5))
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("gpt2", {}), ("bert", {}), ("llama", {"modules_to_save": ["lm_head"]})],
)
def test_computes_what_the_training_process_did(kind: str, changes, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    model = stock(folder, kind, **changes)
    train_a_little(model)
    inputs = model_inputs(kind)
    with torch.no_grad():
        expected, base = output(model, inputs), output(load_base(folder), inputs)
    model.save_pretrained(tmp_path / "stock")
    opened = surgery.load(tmp_path / "stock", base=folder).eval()
    assert opened.peft_config["default"].peft_type == "FROD_PORTABLE"
    with torch.no_grad():
        found = output(opened, inputs)
    assert relative_difference(expected, base) > 1e-2
    assert relative_difference(found, expected) < 1e-4
    # Saved again, it is an adapter of ours.
    opened.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(load_base(folder), tmp_path / "ours").eval()
    with torch.no_grad():
        assert relative_difference(output(again, inputs), found) < 1e-6


def test_without_projections_it_is_refused(llama: Path, tmp_path: Path) -> None:
    stock(llama, "llama", save_projection=False).save_pretrained(tmp_path / "stock")
    with pytest.raises(surgery.errors.AdapterError, match="save_projection"):
        surgery.load(tmp_path / "stock", base=llama)


def test_another_architecture_is_refused(model_folder, tmp_path: Path) -> None:
    stock(model_folder("llama"), "llama").save_pretrained(tmp_path / "stock")
    with pytest.raises(surgery.errors.AdapterError, match=r"model\.layers\.0.*BertModel does not have"):
        surgery.load(tmp_path / "stock", base=model_folder("bert"))


def test_categories_that_collide_in_peft(model_folder, tmp_path: Path) -> None:
    """T5's encoder and decoder share a category in PEFT; both of our roles take its V."""
    folder = model_folder("t5")
    config = FrodConfig(target_modules=["SelfAttention.q"], progressbar=False, sparse_rate=0.05)
    model = get_peft_model(load_base(folder), config).eval()
    train_a_little(model)
    model.save_pretrained(tmp_path / "stock")
    opened = surgery.load(tmp_path / "stock", base=folder).eval()
    inputs = model_inputs("t5")
    with torch.no_grad():
        assert relative_difference(output(opened, inputs), output(model, inputs)) < 1e-4


def test_columns_made_of_rounding_are_refused(model_folder, tmp_path: Path) -> None:
    """Two layers of 32 x 128: fewer rows than columns, and trained through columns that no machine reproduces."""
    folder = model_folder("gpt2")
    config = FrodConfig(target_modules=["mlp.c_proj"], progressbar=False, sparse_rate=0.05)
    model = get_peft_model(load_base(folder), config).eval()
    model.save_pretrained(tmp_path / "start")
    surgery.load(tmp_path / "start", base=folder)  # untrained, it does nothing there
    train_a_little(model)
    model.save_pretrained(tmp_path / "stock")
    with pytest.raises(surgery.errors.AdapterError, match="made of rounding"):
        surgery.load(tmp_path / "stock", base=folder)


def test_a_layer_of_zeros_is_refused_only_where_it_was_trained() -> None:
    """It has no part in any direction, and stays as it is where `l` and `s` are zero."""
    site = Site("fc", "fc", "fc", None, 3, 4)
    positions = torch.tensor([1, 6])
    still = {"l0": torch.zeros(4), "l": torch.zeros(4), "s": torch.zeros(2)}
    _refuse_rounding(site, still, positions)
    for name, moved in (("l", torch.tensor([0, 0, 0.1, 0])), ("s", torch.tensor([0, 0.1]))):
        with pytest.raises(surgery.errors.AdapterError, match="no part in 4 of the 4"):
            _refuse_rounding(site, {**still, name: moved}, positions)
