"""Which adapters and bases are compared, and which are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import surgery
from surgery.errors import AdapterError, WrongBaseError
from tests.helpers.comparisons import (
    CLASSES,
    FILE,
    LORA,
    classifier,
    divergence,
    logits,
    lora,
    read_texts,
    start,
)
from tests.helpers.merges import trained
from tests.helpers.models import edit_tensors, llama_config, load_base
from tests.helpers.texts import save_tokenizer


def test_an_adapter_of_the_bare_model_beside_one_of_a_class_with_a_head(llama: Path, tmp_path: Path) -> None:
    """Their names differ by a prefix; with and without the base they are matched, whichever comes first."""
    bare = trained(tf.LlamaModel.from_pretrained(llama), LORA(r=3, target_modules=["q_proj"]), tmp_path / "bare")
    whole = lora(llama, tmp_path / "whole", 0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    expected = surgery.compare(bare, whole, base=llama)
    assert expected.weight_error and expected.model_class == "LlamaForCausalLM"
    for first, second in ((bare, whole), (whole, bare)):
        with_base = surgery.compare(first, second, base=llama)
        found = surgery.compare(first, second)
        assert len(found.sites) == len(with_base.sites) == 3
        assert found.weight_error == pytest.approx(with_base.weight_error)
        names = {site.module for site in found.sites}
        assert names == set(surgery.Adapter.open(first).modules)
    assert found.weight_error != pytest.approx(expected.weight_error)


def test_adapters_of_other_models(pair, model_folder, tmp_path: Path) -> None:
    a, _ = pair
    other = trained(load_base(model_folder("bert")), LORA(target_modules=["query"]), tmp_path / "bert")
    with pytest.raises(AdapterError, match="no layer in common"):
        surgery.compare(a, other)
    with pytest.raises(AdapterError, match="another base model"):
        surgery.compare(a, other, base=model_folder("llama"))
    small = build_llama(tmp_path / "small", hidden_size=16)
    narrow = lora(small, tmp_path / "narrow")
    with pytest.raises(AdapterError, match=r"32 x 48.*16 x 48.*different bases"):
        surgery.compare(a, narrow)
    with pytest.raises(AdapterError, match="another base model"):
        surgery.compare(a, narrow, base=model_folder("llama"))


def build_llama(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(1)
    tf.LlamaForCausalLM(llama_config(**changes)).save_pretrained(folder)
    return folder


def test_bases_of_other_names_are_told(pair, llama: Path, tmp_path: Path) -> None:
    a, b = pair
    assert not any("names its base" in line for line in surgery.compare(a, b, base=llama).notes)
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    notes = surgery.compare(a, b).notes
    assert f"A names its base '{llama.name}', B names its base 'other': taken for one" in notes
    shutil.copytree(llama, tmp_path / "moved")
    (notes,) = (n for n in surgery.compare(a, a, base=tmp_path / "moved").notes if "taken" in n)
    assert notes.startswith(f"A names its base '{llama.name}'") and "the base given is 'moved'" in notes


def test_another_base_is_refused_by_its_fingerprint(llama: Path, tmp_path: Path) -> None:
    own = start("smoa", llama, tmp_path / "own")
    other = build_llama(tmp_path / "other")
    with pytest.raises(WrongBaseError):
        surgery.compare(own, own, base=other)


def test_what_is_brought_whole(model_folder, tmp_path: Path) -> None:
    folder = model_folder("vit")
    config = LORA(r=2, target_modules=["q_proj"], modules_to_save=["classifier"], bias="all")
    a = trained(load_base(folder), config, tmp_path / "a")
    b = tmp_path / "b"
    shutil.copytree(a, b)
    found = surgery.compare(a, b)
    assert {each.state for each in found.carried} == {"equal"} and {each.difference for each in found.carried} == {0.0}
    head = "base_model.model.classifier.weight"
    bias = next(name for name in load_file(b / FILE) if name.endswith("fc1.bias"))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[head] *= 1.25
        del tensors[bias]

    edit_tensors(b, edit, FILE)
    for base in (None, folder):
        carried = {each.name: each for each in surgery.compare(a, b, base=base).carried}
        assert carried["classifier.weight"].state == "differs"
        assert carried["classifier.weight"].difference == pytest.approx(0.25)
        gone = carried[bias.removeprefix("base_model.model.")]
        assert (gone.state, gone.difference, gone.shape_b) == ("only in a", None, None)
        assert {each.state for each in carried.values()} == {"differs", "only in a", "equal"}


def test_heads_of_other_label_counts(classifiers, tmp_path: Path) -> None:
    """Their files are compared, their answers cannot be."""
    folder, a, _, data = classifiers
    base = tf.BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    three = trained(base, LORA(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"), tmp_path / "three")
    carried = {each.name: each for each in surgery.compare(a, three).carried}
    assert carried["classifier.weight"].state == "differs" and carried["classifier.weight"].difference is None
    assert (carried["classifier.weight"].shape_a, carried["classifier.weight"].shape_b) == ([5, 32], [3, 32])
    assert surgery.compare(a, three, base=folder).weight_error > 0
    with pytest.raises(AdapterError, match=r"classifier\.\w+ \(3.*answers cannot be compared; leave out --data"):
        surgery.compare(a, three, base=folder, data=data)


def test_a_head_that_only_one_brings(classifiers, tmp_path: Path) -> None:
    """The checkpoint has none: the other is run with it, too; where neither brings one, that is said."""
    folder, a, b, data = classifiers
    edit_tensors(b, lambda t: [t.pop(name) for name in list(t) if "classifier" in name], FILE)
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None, "task_type": None}))
    found = surgery.compare(a, b, base=folder, data=data, latency=False)
    assert "B brings no classifier: it answers with A's" in found.notes
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    p = logits(a, classifier(folder), tokenizer, read_texts(data))
    q = logits(b, classifier(folder, a), tokenizer, read_texts(data))
    assert found.kl == pytest.approx(divergence(p, q), rel=1e-4)
    assert {each.state for each in found.carried} == {"only in a"}
    neither = surgery.compare(b, b, base=folder, data=data, task="seq-cls", latency=False)
    assert any("neither adapter brings it" in line and "classifier" in line for line in neither.notes)


def test_a_trained_head_of_the_base_stays_with_the_adapter_that_brings_none(classifiers, tmp_path: Path) -> None:
    _, a, b, data = classifiers
    folder = tmp_path / "trained"
    torch.manual_seed(7)
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=CLASSES)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder, ends_texts=True)
    edit_tensors(b, lambda t: [t.pop(name) for name in list(t) if "classifier" in name], FILE)
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None, "task_type": None}))
    found = surgery.compare(a, b, base=folder, data=data, latency=False)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    p, q = (logits(each, classifier(folder), tokenizer, read_texts(data)) for each in (a, b))
    assert found.kl == pytest.approx(divergence(p, q), rel=1e-4)
    bare = logits(None, classifier(folder, a), tokenizer, read_texts(data))  # the base is scored with A's head
    labels = torch.tensor([json.loads(line)["label"] for line in data.read_text().splitlines()])
    accuracy = float((bare.argmax(-1) == labels).double().mean())
    own = float((logits(None, classifier(folder), tokenizer, read_texts(data)).argmax(-1) == labels).double().mean())
    assert found.scores.base == pytest.approx(accuracy) and accuracy != own
    # A control: with A's head B would say something else.
    wrong = divergence(p, logits(b, classifier(folder, a), tokenizer, read_texts(data)))
    assert found.kl != pytest.approx(wrong, rel=1e-2)


def test_what_is_to_be_known_of_the_files_is_said(llama: Path, tmp_path: Path) -> None:
    """What the file of one lacks, and names of wrappers in both."""
    made = lora(llama, tmp_path / "a")
    shutil.copytree(made, tmp_path / "b")

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"module.{name}"] = tensors.pop(name)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    for name in "ab":
        edit_tensors(tmp_path / name, wrap, FILE)
    edit_tensors(tmp_path / "b", cut, FILE)
    for base in (None, llama):
        notes = surgery.compare(tmp_path / "a", tmp_path / "b", base=base).notes
        assert any(note.startswith("A: ") and "names of wrappers" in note for note in notes), notes
        assert any(note.startswith("B: the file lacks 2 of the layers") for note in notes), notes
