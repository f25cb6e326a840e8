"""A base model is read as transformers would load it, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from surgery.models.base_model import BaseModel
from tests.helpers.models import load_base, save_model

KINDS = ("minilm", "bert", "llama", "gpt2", "t5", "vit", "llama-bf16-sharded")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_those_that_transformers_loads(kind: str, model_folder) -> None:
    folder = model_folder(kind)
    base, loaded = BaseModel.open(folder), load_base(folder)
    sites = base.select()
    assert sites
    for site in sites:
        weight = loaded.get_submodule(site.module).weight
        expected = weight.T if site.transposed else weight
        assert torch.equal(base.weight(site), expected)
        assert base.weight(site).shape == (site.out_features, site.in_features)


def test_no_module_holds_values(llama: Path) -> None:
    assert all(p.device.type == "meta" for p in BaseModel.open(llama).model.parameters())


@pytest.mark.parametrize(
    ("kind", "task", "expected"),
    [
        ("bert", None, "BertModel"),
        ("bert", "seq-cls", "BertForSequenceClassification"),
        ("bert", "masked-lm", "BertForMaskedLM"),
        ("bert", "token-cls", "BertForTokenClassification"),
        ("bert", "question-answering", "BertForQuestionAnswering"),
        ("llama", None, "LlamaForCausalLM"),
        ("llama", "feature-extraction", "LlamaModel"),
        ("llama", "seq-cls", "LlamaForSequenceClassification"),
        ("t5", "seq2seq-lm", "T5ForConditionalGeneration"),
        ("vit", "image-cls", "ViTForImageClassification"),
    ],
)
def test_task_chooses_the_class_and_prefixes_are_bridged(kind: str, task: str | None, expected: str, model_folder):
    folder = model_folder(kind)
    base = BaseModel.open(folder, task)
    assert type(base.model).__name__ == expected
    plain = {s.key: s for s in BaseModel.open(folder).select()}
    for site in base.select():
        assert torch.equal(base.weight(site), BaseModel.open(folder).weight(plain[site.key]))


def test_task_of_the_configured_class_is_recognised(model_folder) -> None:
    found = {kind: BaseModel.open(model_folder(kind)).task for kind in ("llama", "t5", "vit", "bert")}
    assert {kind: task.name for kind, task in found.items() if task} == {
        "llama": "causal-lm",
        "t5": "seq2seq-lm",
        "vit": "image-cls",
        "bert": "feature-extraction",
    }


def test_a_class_that_does_not_exist(model_folder) -> None:
    from surgery.errors import CheckpointError

    with pytest.raises(CheckpointError, match="no causal-lm class for model type 'vit'"):
        BaseModel.open(model_folder("vit"), "causal-lm")


def test_an_unknown_task_is_named(llama: Path) -> None:
    from surgery.errors import CheckpointError

    with pytest.raises(CheckpointError, match="unknown task 'poetry'; the tasks are causal-lm"):
        BaseModel.open(llama, "poetry")


def test_converted_tensors_are_read_through_the_conversion(tmp_path: Path) -> None:
    """A tensor that transformers splits while loading: one file tensor, three sites (written as version 4 did)."""
    from surgery.models.checkpoint_names import parameter_sources

    save_model("mixtral", tmp_path / "mixtral")
    base = BaseModel.open(tmp_path / "mixtral")
    loaded = load_base(tmp_path / "mixtral").state_dict()
    sources = parameter_sources(base.model, base.files.files)
    assert sources.keys() == loaded.keys()
    fused = [name for name, source in sources.items() if len(source.keys) > 1]
    assert fused  # the experts are stacked from one tensor each
    for name in loaded:
        assert torch.equal(base.parameter(name), loaded[name]), name
