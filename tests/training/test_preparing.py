"""An adapter ready for a trainer: its type's own parts train, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch

import surgery
from surgery.errors import AdapterError
from surgery.methods.registry import method_names
from surgery.training.preparing import trained_parameters
from tests.helpers.models import build, labelled_inputs, load_base, save_model, start_options
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

# PEFT type -> what trains, as the methods' papers say.
PARTS = {
    "VERA": {"vera_lambda_b", "vera_lambda_d"},
    "GIVA": {"giva_o", "giva_s"},
    "INILORA": {"inilora_A", "inilora_B"},
    "FROD_PORTABLE": {"frod_portable_l", "frod_portable_s"},
    "SMOA": {"smoa_A", "smoa_B"},
    "LORA": {"lora_A", "lora_B"},
    "LOHA": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
}


def stock(kind: str, model: Path, out: Path) -> Path:
    """An adapter as stock PEFT makes and saves it."""
    made = {"LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig}[kind](target_modules=["q_proj", "v_proj"], r=2)
    torch.manual_seed(0)
    peft.get_peft_model(load_base(model), made).save_pretrained(out)
    return out


def parts(names: set[str]) -> set[str]:
    return {re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[2] for name in names}


@pytest.mark.parametrize("name", [*method_names(), "LORA", "LOHA"])
def test_a_type_trains_its_own_parts(name: str, llama: Path, tmp_path: Path) -> None:
    if name in method_names():
        adapter, report = surgery.init(llama, name, tmp_path / "a", **start_options(name, "llama"))
        kind, count = adapter.peft_type, report.trainable_parameters
    else:
        adapter = surgery.Adapter.open(stock(name, llama, tmp_path / "a"))
        kind, count = name, sum(tensor.numel() for tensor in adapter.tensors.values())
    model = surgery.trainable(tmp_path / "a", llama)
    found = trained_parameters(model)
    assert parts(set(found)) == PARTS[kind]
    assert set(found) <= set(adapter.tensors)
    assert sum(parameter.numel() for parameter in found.values()) == count
    model(**labelled_inputs("llama")).loss.backward()
    assert all(parameter.grad is not None for parameter in found.values())
    assert sum(p.grad is not None for p in model.parameters()) == len(found)


def test_a_head_that_is_carried_trains(tmp_path: Path) -> None:
    model = save_tokenizer(save_model("bert", tmp_path / "model"))
    write_rows(tmp_path / "classes.jsonl", text_rows(9, labels=3))
    surgery.init(model, "giva", tmp_path / "a", task="seq-cls", data=tmp_path / "classes.jsonl")
    peft_model = surgery.trainable(tmp_path / "a", model)
    assert type(peft_model.get_base_model()).__name__ == "BertForSequenceClassification"
    assert peft_model.get_base_model().config.num_labels == 3
    assert parts(set(trained_parameters(peft_model))) == PARTS["GIVA"] | {"classifier"}
    only = surgery.trainable(tmp_path / "a", model, only=["giva_s"])
    assert parts(set(trained_parameters(only))) == {"giva_s"}


def test_a_base_with_a_head_of_other_labels(tmp_path: Path) -> None:
    """The checkpoint's own head has five outputs, the adapter's three."""
    vit = build("vit")
    vit.save_pretrained(tmp_path / "model")
    settings = {"target_modules": "all-linear", "modules_to_save": ["classifier"]}
    vit.classifier = torch.nn.Linear(32, 3)
    vit.config.num_labels = 3
    peft.get_peft_model(vit, peft.LoraConfig(**settings)).save_pretrained(tmp_path / "a")
    provenance = surgery.Adapter.open(tmp_path / "a")
    model = surgery.trainable(provenance, tmp_path / "model", task="image-cls")
    head = model.get_base_model().classifier.modules_to_save["default"]
    assert torch.equal(head.weight, provenance.tensors["base_model.model.classifier.weight"])


def test_a_model_of_ones_own(llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "vera", tmp_path / "a")
    base = load_base(llama)
    model = surgery.trainable(tmp_path / "a", base, only=["vera_lambda_d"])
    assert model.get_base_model() is base
    assert parts(set(trained_parameters(model))) == {"vera_lambda_d"}


def test_an_adapter_names_its_base(llama: Path, tmp_path: Path) -> None:
    adapter, _ = surgery.init(llama, "vera", tmp_path / "a")
    assert trained_parameters(surgery.trainable(tmp_path / "a"))
    adapter.config["base_model_name_or_path"] = None
    with pytest.raises(AdapterError, match="names no base model"):
        surgery.trainable(adapter)


def test_refusals(llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "vera", tmp_path / "a")
    with pytest.raises(AdapterError, match="is called nope; there are vera_lambda_b, vera_lambda_d"):
        surgery.trainable(tmp_path / "a", llama, only=["nope"])
    bert = save_model("bert", tmp_path / "bert")
    surgery.init(bert, "vera", tmp_path / "bare")
    with pytest.raises(AdapterError, match="has the head classifier of seq-cls; make an adapter with one"):
        surgery.trainable(tmp_path / "bare", bert, task="seq-cls")
