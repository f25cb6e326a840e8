"""surgery.load: fits an adapter to the model's class or refuses; and the road through a stock Trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import surgery
from surgery.errors import AdapterError
from tests.helpers.models import load_base, model_inputs, output, perturb, relative_difference, start_options

METHODS = ("vera", "giva", "inilora", "frod", "smoa")


def trained_on(model, adapter: Path, out: Path) -> torch.Tensor:
    """Train an adapter a little on a model, save it, and return the model's hidden states."""
    peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
    perturb(peft_model)
    peft_model.save_pretrained(out)
    with torch.no_grad():
        return output(peft_model, model_inputs("bert"))


@pytest.mark.parametrize("method", METHODS)
def test_bare_adapter_on_a_model_with_a_head(method: str, model_folder, tmp_path: Path) -> None:
    """PEFT alone finds no place for the tensors and goes on; surgery.load puts them where they belong."""
    folder = model_folder("bert")
    needed = start_options(method, "bert")
    surgery.init(folder, method, tmp_path / "start", **needed)
    expected = trained_on(load_base(folder), tmp_path / "start", tmp_path / "trained")
    classifier = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    loaded = surgery.load(tmp_path / "trained", base=classifier)
    with torch.no_grad():
        inner = loaded.base_model.model.bert(**model_inputs("bert")).last_hidden_state
    assert relative_difference(inner, expected) < 1e-6
    # And back: an adapter made for the class with a head, on the bare model.
    surgery.init(folder, method, tmp_path / "start-mlm", task="masked-lm", **needed)
    masked = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    head = PeftModel.from_pretrained(masked, tmp_path / "start-mlm", is_trainable=True).eval()
    perturb(head)
    head.save_pretrained(tmp_path / "trained-mlm")
    bare = surgery.load(tmp_path / "trained-mlm", base=load_base(folder)).eval()
    with torch.no_grad():
        here = output(bare, model_inputs("bert"))
        there = head.base_model.model.bert(**model_inputs("bert")).last_hidden_state
    assert relative_difference(here, there) < 1e-6


def with_labels(folder: Path, place: Path, count: int) -> Path:
    """A copy of a model's folder whose configuration has so many labels."""
    copied = Path(shutil.copytree(folder, place))
    settings = json.loads((copied / "config.json").read_text())
    settings["id2label"] = {str(index): f"class {index}" for index in range(count)}
    settings["label2id"] = {name: int(index) for index, name in settings["id2label"].items()}
    (copied / "config.json").write_text(json.dumps(settings))
    return copied


@pytest.mark.parametrize("base_head", [None, 3])
@pytest.mark.parametrize("method", ["giva", "vera"])
def test_base_gets_as_many_labels_as_the_head_has(method: str, base_head, model_folder, tmp_path: Path) -> None:
    """Whether the base is bare or brings a head of another size."""
    folder = model_folder("bert")
    seven = with_labels(folder, tmp_path / "seven", 7)
    surgery.init(seven, method, tmp_path / "start", task="seq-cls", **start_options(method, "bert"))
    classifier = transformers.BertForSequenceClassification.from_pretrained(seven)
    expected = trained_on(classifier, tmp_path / "start", tmp_path / "trained")
    assert expected.shape == (2, 7)
    if base_head is not None:
        folder = tmp_path / "base"
        other = transformers.BertForSequenceClassification.from_pretrained(seven, num_labels=base_head)
        other.save_pretrained(folder)
    loaded = surgery.load(tmp_path / "trained", base=folder).eval()
    assert loaded.config.num_labels == 7
    with torch.no_grad():
        assert relative_difference(output(loaded, model_inputs("bert")), expected) < 1e-6
    if base_head is not None:
        return
    # What a merge makes of it agrees.
    surgery.merge(tmp_path / "trained", folder, tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert relative_difference(output(merged, model_inputs("bert")), expected) < 1e-4


def test_peft_alone_is_told_for_our_types(model_folder, tmp_path: Path) -> None:
    folder = model_folder("bert")
    surgery.init(folder, "inilora", tmp_path / "start")
    classifier = transformers.BertForSequenceClassification.from_pretrained(folder)
    with pytest.raises(surgery.errors.AdapterError, match=r"surgery\.load"):
        PeftModel.from_pretrained(classifier, tmp_path / "start")


def test_base_by_name_and_by_default(llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "inilora", tmp_path / "start")
    inputs = model_inputs("llama")
    expected = output(load_base(llama), inputs)
    for base in (llama, str(llama), None):
        model = surgery.load(tmp_path / "start", base=base, is_trainable=True)
        assert any(p.requires_grad for p in model.parameters())
        with torch.no_grad():
            assert relative_difference(output(model.eval(), inputs), expected) < 1e-5


def test_another_architecture_is_refused(model_folder, tmp_path: Path) -> None:
    surgery.init(model_folder("llama"), "inilora", tmp_path / "start")
    with pytest.raises(surgery.errors.AdapterError, match=r"does not fit Bert.*model\.layers\.0"):
        surgery.load(tmp_path / "start", base=model_folder("bert"))


class Rows(torch.utils.data.Dataset):
    """Rows of token ids with themselves as labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 60, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("method", METHODS)
def test_stock_trainer_saves_what_loads_again(method: str, llama: Path, tmp_path: Path) -> None:
    """init -> transformers' Trainer -> its own save -> load, with checkpoints and resuming on the way."""
    surgery.init(llama, method, tmp_path / "start", **start_options(method, "llama"))
    base = load_base(llama)
    with torch.no_grad():
        before = output(base, model_inputs("llama"))
    model = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    arguments = {
        "output_dir": str(tmp_path / "run"),
        "learning_rate": 1e-2,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
    }
    settings = transformers.TrainingArguments(max_steps=4, **arguments)
    trainer = transformers.Trainer(model, settings, train_dataset=Rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    with torch.no_grad():
        after = output(model.eval(), model_inputs("llama"))
    assert relative_difference(after, before) > 1e-4
    again = PeftModel.from_pretrained(load_base(llama), tmp_path / "trained").eval()
    with torch.no_grad():
        assert relative_difference(output(again, model_inputs("llama")), after) < 1e-6

    resumed = PeftModel.from_pretrained(load_base(llama), tmp_path / "start", is_trainable=True)
    trainer = transformers.Trainer(resumed, settings, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    with torch.no_grad():
        assert relative_difference(output(resumed.eval(), model_inputs("llama")), after) < 1e-5


def test_adapter_with_a_head_opens_by_its_own_defaults(model_folder, tmp_path: Path) -> None:
    for task, name in (("seq-cls", "BertForSequenceClassification"), ("masked-lm", "BertForMaskedLM")):
        surgery.init(model_folder("bert"), "inilora", tmp_path / task, task=task)
        model = surgery.load(tmp_path / task)
        assert type(model.get_base_model()).__name__ == name


def test_what_the_checkpoint_lacks_is_the_same_at_every_load(tmp_path: Path) -> None:
    """A masked-LM checkpoint has no pooler: a classifier on it would find another one each time."""
    from tests.helpers.models import build

    masked = transformers.BertForMaskedLM(build("bert").config)
    masked.save_pretrained(tmp_path / "masked")
    _, report = surgery.init(tmp_path / "masked", "inilora", tmp_path / "out", task="seq-cls")
    assert any("pooler" in line for line in report.notes) and any("classifier" in line for line in report.notes)
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = surgery.load(tmp_path / "out", base=tmp_path / "masked", task="seq-cls").eval()
        with torch.no_grad():
            outputs.append(output(model, model_inputs("bert")))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("method", ["vera", "inilora"])
def test_heads_of_several_modules(method: str, tmp_path: Path) -> None:
    """DistilBERT's head is pre_classifier and classifier: PEFT saves both, by the ends of their names."""
    config = transformers.DistilBertConfig(
        vocab_size=61, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=32
    )
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "bare")
    surgery.init(tmp_path / "bare", method, tmp_path / "out", task="seq-cls")
    model = surgery.load(tmp_path / "out", base=tmp_path / "bare", is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("pre_classifier" in name for name in trained)


def test_names_that_peft_would_translate_again(tmp_path: Path) -> None:
    """PEFT takes Laguna's shared experts for names of an older version, and silently leaves them as they start."""
    size = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = transformers.LagunaConfig(**size, **heads, **experts, shared_expert_intermediate_size=16)
    transformers.LagunaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = transformers.LagunaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["shared_experts.gate_proj"]))
    perturb(model)
    wanted = {name: tensor.clone() for name, tensor in model.named_parameters() if ".lora_" in name}
    model.save_pretrained(tmp_path / "lora")
    opened = surgery.load(tmp_path / "lora", tmp_path / "base")
    found = {name: tensor for name, tensor in opened.named_parameters() if ".lora_" in name}
    assert wanted and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_tensor_that_peft_does_not_load_is_an_error(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(load_base(llama), LoraConfig(r=2, target_modules=["q_proj"]))
    perturb(model)
    model.save_pretrained(tmp_path / "lora")

    def forgetful(base: torch.nn.Module, folder: Path, **options: object) -> PeftModel:
        return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))

    monkeypatch.setattr(PeftModel, "from_pretrained", forgetful)
    with pytest.raises(AdapterError, match=r"does not load base_model.*q_proj.*surgery merge"):
        surgery.load(tmp_path / "lora", load_base(llama))
