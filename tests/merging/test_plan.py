"""What a merge changes, adds and refuses before it reads a weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import surgery
from surgery.errors import AdapterError, SurgeryError
from tests.helpers.merges import check_merged, outputs, trained
from tests.helpers.models import (
    build,
    edit_tensors,
    llama_config,
    load_base,
    model_inputs,
    relative_difference,
    spread,
)
from tests.helpers.stock_adapters import randomise
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

OWN_LABELS = ["bad", "fair", "good"]
# Class, targets, and what is saved whole, of models with a head; RoBERTa's and ViT's are of another build than BERT's.
HEADS: dict[str, tuple[str, list[str], list[str]]] = {
    "bert": ("BertForSequenceClassification", ["query", "dense"], ["classifier"]),
    "roberta": ("RobertaForSequenceClassification", ["query"], ["classifier"]),
    "llama": ("LlamaForSequenceClassification", ["q_proj"], ["score"]),
    "vit": ("ViTForImageClassification", ["q_proj"], ["classifier"]),
}


def with_own_head(kind: str, folder: Path) -> tuple[str, Path, list[str]]:
    """A sharded model with a head of three named labels: its class, folder, and layers to adapt."""
    name, targets, _ = HEADS[kind]
    if kind == "roberta":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config: Any = tf.RobertaConfig(vocab_size=61, max_position_embeddings=40, **sizes)
    else:
        config = build(kind).config
    config.id2label, config.label2id = dict(enumerate(OWN_LABELS)), {name: i for i, name in enumerate(OWN_LABELS)}
    config.pad_token_id = 0
    torch.manual_seed(3)
    model = getattr(tf, name)(config)
    spread(model)
    model.save_pretrained(folder, max_shard_size="20KB")
    return name, folder, targets


class TestWholeTensors:
    """What an adapter saves beside its factors."""

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_biases(self, bias: str, model_folder, tmp_path: Path) -> None:
        config = peft.LoraConfig(r=4, target_modules=["query"], bias=bias)
        adapter = trained(load_base(model_folder("bert")), config, tmp_path / "lora")
        report = check_merged(adapter, model_folder("bert"), "bert", tmp_path / "merged")
        assert "encoder.layer.0.attention.self.query.bias" in report.replaced

    def test_trained_biases_are_no_hindrance_to_load(self, model_folder, tmp_path: Path) -> None:
        """Their names lie one level below the layer's; on a class with a head they find their places, too."""
        base = model_folder("bert")
        config = peft.LoraConfig(r=4, target_modules=["query"], bias="lora_only")
        adapter = trained(load_base(base), config, tmp_path / "lora")
        expected = outputs(PeftModel.from_pretrained(load_base(base), adapter), "bert")
        assert relative_difference(outputs(surgery.load(adapter, load_base(base)), "bert"), expected) < 1e-6
        masked = surgery.load(adapter, tf.BertForMaskedLM.from_pretrained(base)).eval()
        inner = masked.base_model.model.bert(**model_inputs("bert")).last_hidden_state
        assert relative_difference(inner.detach(), expected) < 1e-6

    def test_the_bias_of_lora_b(self, model_folder, tmp_path: Path) -> None:
        config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["query"], lora_bias=True)
        adapter = trained(load_base(model_folder("bert")), config, tmp_path / "lora")
        check_merged(adapter, model_folder("bert"), "bert", tmp_path / "merged")

    @pytest.mark.parametrize("labels", [2, 5])
    def test_a_head_that_the_base_lacks_is_added_with_its_labels(
        self, labels: int, model_folder, tmp_path: Path
    ) -> None:
        base = model_folder("bert")
        model = tf.BertForSequenceClassification.from_pretrained(base, num_labels=labels)
        config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
        live = get_peft_model(model, config)
        randomise(live)
        live.save_pretrained(tmp_path / "lora")
        report = surgery.merge(tmp_path / "lora", base, tmp_path / "merged")
        assert report.added == ["classifier.bias", "classifier.weight"]
        assert report.model_class == "BertForSequenceClassification"
        merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert merged.config.num_labels == labels
        assert relative_difference(outputs(merged, "bert"), outputs(live, "bert")) < 2e-5

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    @pytest.mark.parametrize("labels", [2, 7])
    @pytest.mark.parametrize("kind", HEADS)
    def test_a_head_of_another_number_of_labels_than_the_bases_own(
        self, kind: str, labels: int, dtype: str | None, tmp_path: Path
    ) -> None:
        name, base, targets = with_own_head(kind, tmp_path / "base")
        model_class = getattr(tf, name)
        live = get_peft_model(
            model_class.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True),
            peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", modules_to_save=list(HEADS[kind][2])),
        )
        randomise(live)
        live.save_pretrained(tmp_path / "lora")
        report = surgery.merge(tmp_path / "lora", base, tmp_path / "merged", dtype=dtype)
        assert not report.added and all(part in " ".join(report.replaced) for part in HEADS[kind][2])
        merged = model_class.from_pretrained(tmp_path / "merged", dtype="auto")
        assert merged.config.num_labels == labels
        assert merged.config.id2label == {index: f"LABEL_{index}" for index in range(labels)}
        expected, found = (outputs(model, kind) for model in (live, merged.float()))
        assert found.shape == (2, labels)
        assert relative_difference(found, expected) < (2e-5 if dtype is None else 5e-2)
        size = sum(tensor.nbytes for file in report.files for tensor in load_file(tmp_path / "merged" / file).values())
        index = tmp_path / "merged" / "model.safetensors.index.json"
        assert json.loads(index.read_text())["metadata"]["total_size"] == size
        # A control: the base's own head is another.
        assert model_class.from_pretrained(base).config.id2label == dict(enumerate(OWN_LABELS))

    @pytest.mark.parametrize("labels", [["bad", "good"], ["bad", "fair", "good", "so so"], [0, 2, 4]])
    def test_the_names_of_classes_reach_the_merged_configuration(
        self, labels: list[Any], model_folder, tmp_path: Path
    ) -> None:
        """Through `surgery init` on named labels, training by PEFT, conversion and merge."""
        base = shutil.copytree(model_folder("bert"), tmp_path / "base")
        save_tokenizer(base)
        rows = [{**row, "label": labels[i % len(labels)]} for i, row in enumerate(text_rows(8))]
        data = write_rows(tmp_path / "rows.jsonl", rows)
        surgery.init(base, "giva", tmp_path / "start", rank=2, data=data, task="seq-cls", target=["query", "value"])
        live = surgery.load(tmp_path / "start", base, is_trainable=True).eval()
        randomise(live)
        live.save_pretrained(tmp_path / "trained")
        bare = surgery.merge(tmp_path / "trained", base, tmp_path / "unnamed")
        assert bare.model_class == "BertForSequenceClassification"
        shutil.copy(tmp_path / "start" / "surgery.json", tmp_path / "trained")
        surgery.convert(tmp_path / "trained", "lora", tmp_path / "converted", dtype="float32")
        named = [str(label) for label in labels]
        expected = dict(enumerate(named)) if labels != [0, 2, 4] else {i: f"LABEL_{i}" for i in range(5)}
        for adapter in ("trained", "converted"):
            surgery.merge(tmp_path / adapter, base, tmp_path / f"merged {adapter}", force=True)
            merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / f"merged {adapter}")
            assert merged.config.id2label == expected
            assert merged.config.label2id == {name: index for index, name in expected.items()}
            assert relative_difference(outputs(merged, "bert"), outputs(live, "bert")) < 2e-5
        # A control: without surgery.json nobody knows them.
        unnamed = tf.AutoConfig.from_pretrained(tmp_path / "unnamed")
        assert unnamed.id2label == {index: f"LABEL_{index}" for index in expected}

    def test_an_adapter_of_the_bare_model_on_a_model_with_a_head(self, model_folder, tmp_path: Path) -> None:
        bare = load_base(model_folder("llama")).model
        adapter = trained(bare, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "lora")
        surgery.merge(adapter, model_folder("llama"), tmp_path / "merged")
        merged = load_base(tmp_path / "merged")
        live = PeftModel.from_pretrained(load_base(model_folder("llama")).model, adapter)
        assert isinstance(merged, tf.LlamaForCausalLM)
        assert relative_difference(outputs(merged.model), outputs(live)) < 2e-5

    def test_a_grown_vocabulary_is_refused_with_advice(self, llama: Path, tmp_path: Path) -> None:
        grown = load_base(llama)
        grown.resize_token_embeddings(70)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        adapter = trained(grown, config, tmp_path / "lora")
        with pytest.raises(
            AdapterError, match=r"\(70, 32\), the base has it \(61, 32\).*resize_token_embeddings\(70\)"
        ):
            surgery.merge(adapter, llama, tmp_path / "merged")
        resized = load_base(llama)
        resized.resize_token_embeddings(70)
        resized.save_pretrained(tmp_path / "resized")
        surgery.merge(adapter, tmp_path / "resized", tmp_path / "merged")
        live = PeftModel.from_pretrained(load_base(tmp_path / "resized"), adapter)
        assert relative_difference(outputs(load_base(tmp_path / "merged")), outputs(live)) < 2e-5

    def test_a_head_that_has_no_place_is_named(self, model_folder, tmp_path: Path) -> None:
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        adapter = trained(load_base(model_folder("llama")), config, tmp_path / "lora")
        with pytest.raises(AdapterError, match=r"brings lm_head.weight, for which LlamaModel has no place.*--task"):
            surgery.merge(adapter, model_folder("llama"), tmp_path / "merged", task="feature-extraction")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "quantised": (
        lambda base: _edit_config(base, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised",
    ),
    "smaller": (
        lambda base: _resave(base, llama_config(num_hidden_layers=1)),
        r"layers.1.self_attn.q_proj, which LlamaForCausalLM .* does not have",
    ),
    "wider": (
        lambda base: _resave(base, llama_config(hidden_size=64)),
        r"as a weight of 32 x 32, the base has 64 x 64 there: it is for another base model",
    ),
    "broken": (lambda base: (base / "model.safetensors").write_bytes(b"\x00" * 100), "not a complete safetensors file"),
    "nan": (
        lambda base: edit_tensors(base, lambda t: t["model.layers.0.self_attn.q_proj.weight"].fill_(float("nan"))),
        "holds NaN or Inf",
    ),
}


def _edit_config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _resave(base: Path, config: tf.LlamaConfig) -> None:
    shutil.rmtree(base)
    tf.LlamaForCausalLM(config).save_pretrained(base)


@pytest.mark.parametrize("name", REFUSED)
def test_bases_that_do_not_fit_are_refused_in_one_line(name: str, llama: Path, tmp_path: Path) -> None:
    adapter = trained(load_base(llama), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "lora")
    shutil.copytree(llama, tmp_path / "base")
    REFUSED[name][0](tmp_path / "base")
    with pytest.raises(SurgeryError, match=REFUSED[name][1]):
        surgery.merge(adapter, tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


def test_expert_weights_are_refused_with_the_reason(model_folder, tmp_path: Path) -> None:
    adapter = trained(
        load_base(model_folder("mixtral")), peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "a"
    )
    surgery.merge(adapter, model_folder("mixtral"), tmp_path / "merged")

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".0.self_attn.q_proj." in name]:
            tensors[name.replace("self_attn.q_proj", "mlp.experts")] = tensors.pop(name)

    edit_tensors(adapter, move, "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="fused 3-D expert weights"):
        surgery.merge(adapter, model_folder("mixtral"), tmp_path / "refused")


@pytest.mark.parametrize("kind", ["lora", "dora", "giva"])
def test_a_dry_run_refuses_another_width_as_the_real_run_does(kind: str, llama: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=kind == "dora")
    lora = trained(load_base(llama), config, tmp_path / "lora")
    if kind == "giva":
        surgery.convert(lora, "giva", tmp_path / "giva", ratio=2, accept_loss=True)
        lora = tmp_path / "giva"
    wide = tmp_path / "wide"
    tf.LlamaForCausalLM(llama_config(hidden_size=64)).save_pretrained(wide)
    messages = []
    for dry_run in (True, False):
        with pytest.raises(AdapterError, match=r"q_proj.*32.*64") as refused:
            surgery.merge(lora, wide, tmp_path / "out", dry_run=dry_run)
        messages.append(str(refused.value))
        assert surgery.merge(lora, llama, dry_run=True).modules == 3
    assert messages[0] == messages[1]
