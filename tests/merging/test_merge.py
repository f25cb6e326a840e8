"""Merged folders open with transformers alone and compute what PEFT's merge of the same adapter computes."""

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
from surgery.errors import AdapterError, CheckpointError, MethodError, OutputError, SurgeryError, WrongBaseError
from surgery.merging import folder as merged_folder
from tests.adapters.test_stock_types import randomise
from tests.helpers.command_line import contents, invoke
from tests.helpers.models import (
    build,
    edit_tensors,
    llama_config,
    load_base,
    model_inputs,
    output,
    relative_difference,
    spread,
)
from tests.helpers.texts import save_tokenizer, text_rows, write_rows
from tests.initialization.test_init import perturb

TARGETS = {
    "bert": ["query", "dense"],
    "llama": ["q_proj", "k_proj", "down_proj"],
    "llama-bf16-sharded": ["q_proj", "k_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "k", "wo"],
    "vit": ["q_proj", "fc1"],
}
STOCK: dict[str, peft.PeftConfig] = {
    "rslora": peft.LoraConfig(r=4, use_rslora=True, alpha_pattern={"k_proj": 3}),
    "loha": peft.LoHaConfig(r=2),
    "lokr": peft.LoKrConfig(r=2),
    "hira": peft.HiraConfig(r=2),
    "randlora": peft.RandLoraConfig(r=5, randlora_alpha=5),
    "vera": peft.VeraConfig(r=5),
    "vera from its seed": peft.VeraConfig(r=5, save_projection=False),
}


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


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in kind else torch.float32


def trained(base: Any, config: peft.PeftConfig, out: Path) -> Path:
    """An adapter with values in every tensor that trains, saved by PEFT."""
    model = get_peft_model(base, config)
    randomise(model)
    model.save_pretrained(out)
    return out


def tied_llama(folder: Path, tie: bool = True) -> Path:
    """A Llama whose embedding is its output head, too."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(llama_config(tie_word_embeddings=tie))
    spread(model)
    model.save_pretrained(folder)
    return folder


def outputs(model: Any, kind: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return output(model.eval(), model_inputs(kind.split("-", maxsplit=1)[0]))


def check_merged(adapter: Path, base: Path, kind: str, out: Path, **options: Any) -> Any:
    """Merge, and compare every parameter and the outputs with PEFT's merge; returns the report."""
    report = surgery.merge(adapter, base, out, **options)
    dtype = dtype_of(kind)
    reference = PeftModel.from_pretrained(load_base(base, dtype), adapter).merge_and_unload()
    found = load_base(out, dtype)
    expected = dict(reference.named_parameters())
    for name, parameter in found.named_parameters():
        assert parameter.dtype == dtype
        # One rounding of each of two float32 sums that add in another order.
        tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(parameter, expected[name], rtol=tolerance, atol=tolerance)
    difference = relative_difference(outputs(found, kind), outputs(reference, kind))
    assert difference < (2e-2 if dtype == torch.bfloat16 else 2e-5)
    # A control: the adapter does something.
    assert relative_difference(outputs(load_base(base, dtype), kind), outputs(reference, kind)) > 0.03
    return report


@pytest.mark.parametrize("kind", TARGETS)
def test_lora_on_every_kind_of_model(kind: str, model_folder, tmp_path: Path) -> None:
    base = model_folder(kind)
    adapter = trained(load_base(base), peft.LoraConfig(r=4, target_modules=TARGETS[kind]), tmp_path / "lora")
    report = check_merged(adapter, base, kind, tmp_path / "merged")
    before, after = contents(base), contents(tmp_path / "merged")
    assert set(after) == {*before, "surgery.json"}
    shards = [name for name in before if name.endswith(".safetensors")]
    assert report.files == sorted(shards) and report.bytes == sum(len(after[name] or b"") for name in shards)
    assert all(before[name] == after[name] for name in before if name not in {*shards, "model.safetensors.index.json"})
    changed = {f"{site.module}.weight" for site in report.sites}
    assert len(changed) == report.modules > 1
    for name in shards:
        old, new = load_file(base / name), load_file(tmp_path / "merged" / name)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old if not key.endswith(tuple(changed)) and kind != "vit")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", STOCK)
def test_every_stock_type(name: str, llama: Path, tmp_path: Path) -> None:
    config = type(STOCK[name])(**{**STOCK[name].to_dict(), "target_modules": TARGETS["llama"]})
    check_merged(trained(load_base(llama), config, tmp_path / "adapter"), llama, "llama", tmp_path / "merged")


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("method", ["inilora", "inilora-beta", "frod", "smoa"])
def test_own_types(method: str, kind: str, store: bool, model_folder, tmp_path: Path) -> None:
    base = model_folder(kind)
    options = {} if store else {"store_bases": False}
    surgery.init(base, method, tmp_path / "start", target=TARGETS[kind], **options)
    model = PeftModel.from_pretrained(load_base(base), tmp_path / "start", is_trainable=True)
    perturb(model)
    model.save_pretrained(tmp_path / "trained")
    check_merged(tmp_path / "trained", base, kind, tmp_path / "merged")


@pytest.mark.parametrize("method", ["frod", "smoa", "inilora"])
def test_another_base_is_refused_for_adapters_that_depend_on_it(method: str, llama: Path, tmp_path: Path) -> None:
    options = {"store_bases": False} if method == "inilora" else {}
    surgery.init(llama, method, tmp_path / "start", target=["q_proj"], **options)
    shutil.copytree(llama, tmp_path / "other")
    edit_tensors(tmp_path / "other", lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].mul_(1.001))
    surgery.merge(tmp_path / "start", llama, tmp_path / "merged")
    with pytest.raises(WrongBaseError, match="other base weights"):
        surgery.merge(tmp_path / "start", tmp_path / "other", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_weights_that_are_fused_in_the_file_are_written_back(tmp_path: Path) -> None:
    """NomicBert's file holds q, k and v in one tensor, which transformers splits while loading."""
    if not hasattr(tf, "NomicBertConfig"):
        pytest.skip("this transformers has no NomicBert")
    torch.manual_seed(0)
    config = tf.NomicBertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = tf.NomicBertModel(config)
    spread(model)
    model.save_pretrained(tmp_path / "base")
    fused = [name for name in load_file(tmp_path / "base" / "model.safetensors") if "qkv" in name.lower()]
    assert len(fused) == 2
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    adapter = trained(load_base(tmp_path / "base"), config, tmp_path / "lora")
    check_merged(adapter, tmp_path / "base", "bert", tmp_path / "merged")
    old, new = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert old.keys() == new.keys()
    q, k, v = (old[fused[0]] - new[fused[0]]).chunk(3)
    assert q.any() and v.any() and not k.any()


def test_a_rule_that_computes_is_not_inverted() -> None:
    from surgery.models.write_back import written_back

    class Doubling:
        keys = (("a", "a"),)

        def read(self, parameter: str, model: Any, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
            return read("a") * 2

    with pytest.raises(CheckpointError, match="p: cannot be written back into a"):
        written_back(Doubling(), None, lambda key: torch.ones(3), {"p": torch.zeros(3)})  # type: ignore[arg-type]


class TestTiedWeights:
    """An adapter that changes one of two tied weights makes them two."""

    def test_lora_on_a_tied_output_head(self, tmp_path: Path) -> None:
        base = tied_llama(tmp_path / "base")
        assert "lm_head.weight" not in load_file(base / "model.safetensors")
        config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
        adapter = trained(load_base(base), config, tmp_path / "lora")
        report = surgery.merge(adapter, base, tmp_path / "merged")
        assert any("tie_word_embeddings" in note for note in report.notes) and report.added == ["lm_head.weight"]
        # PEFT's own merge would change the embedding with the head; the adapter on the model does not.
        live = PeftModel.from_pretrained(load_base(base), adapter)
        merged = load_base(tmp_path / "merged")
        assert not merged.config.tie_word_embeddings
        assert relative_difference(outputs(merged), outputs(live)) < 2e-5
        assert torch.equal(merged.model.embed_tokens.weight, load_base(base).model.embed_tokens.weight)
        assert relative_difference(outputs(load_base(base)), outputs(live)) > 0.1

    @pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
    def test_a_tied_weight_that_is_replaced(self, modules: list[str], tmp_path: Path) -> None:
        base = tied_llama(tmp_path / "base")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules)
        adapter = trained(load_base(base), config, tmp_path / "lora")
        surgery.merge(adapter, base, tmp_path / "merged")
        live = PeftModel.from_pretrained(load_base(base), adapter)
        assert relative_difference(outputs(load_base(tmp_path / "merged")), outputs(live)) < 2e-5

    def test_equal_replacements_stay_tied(self, tmp_path: Path) -> None:
        base = tied_llama(tmp_path / "base")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        adapter = trained(load_base(base), config, tmp_path / "lora")
        head, embedding = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
        edit_tensors(adapter, lambda t: t.update({head: t[embedding].clone()}), "adapter_model.safetensors")
        report = surgery.merge(adapter, base, tmp_path / "merged")
        merged = load_base(tmp_path / "merged")
        assert merged.config.tie_word_embeddings and not report.added
        live = PeftModel.from_pretrained(load_base(base), adapter)
        assert relative_difference(outputs(merged), outputs(live)) < 2e-5

    def test_an_untied_head_is_merged_as_any_layer(self, tmp_path: Path) -> None:
        base = tied_llama(tmp_path / "base", tie=False)
        config = peft.LoraConfig(r=4, target_modules=["lm_head"])
        adapter = trained(load_base(base), config, tmp_path / "lora")
        assert not check_merged(adapter, base, "llama", tmp_path / "merged").added

    def test_a_model_that_computes_otherwise_once_untied_is_refused(self, model_folder, tmp_path: Path) -> None:
        base = model_folder("t5")
        adapter = trained(load_base(base), peft.LoraConfig(r=4, target_modules=["lm_head"]), tmp_path / "lora")
        with pytest.raises(CheckpointError, match=r"lm_head.weight.*only used as an adapter"):
            surgery.merge(adapter, base, tmp_path / "merged")


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


class TestDtypes:
    """The result's dtype is the base's, or the one that is asked for."""

    @pytest.fixture
    def adapter(self, llama: Path, tmp_path: Path) -> Path:
        return trained(load_base(llama), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "lora")

    def test_half_precision_base_to_float32_keeps_all_of_the_change(self, adapter, model_folder, tmp_path) -> None:
        base = model_folder("llama-bf16-sharded")
        kept = surgery.merge(adapter, base, tmp_path / "kept")
        wide = surgery.merge(adapter, base, tmp_path / "wide", dtype="float32")
        assert max(site.rounding for site in kept.sites) > 1e-3 and max(site.rounding for site in wide.sites) == 0
        assert set(wide.dtypes) == {"float32"} and wide.bytes > 1.8 * kept.bytes
        opened = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto")
        assert opened.dtype == torch.float32
        expected = PeftModel.from_pretrained(load_base(base), adapter).merge_and_unload()
        name = "model.layers.2.self_attn.q_proj.weight"
        torch.testing.assert_close(opened.get_parameter(name), expected.get_parameter(name), rtol=0, atol=2e-6)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_float32_base_to_half_precision_rounds_once(self, dtype, adapter, llama, tmp_path: Path) -> None:
        surgery.merge(adapter, llama, tmp_path / "merged", dtype=dtype)
        surgery.merge(adapter, llama, tmp_path / "exact")
        found, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "exact"))
        assert all(torch.equal(found[name], exact[name].to(getattr(torch, dtype))) for name in exact)
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype

    def test_overflow_is_refused(self, adapter, llama, tmp_path: Path) -> None:
        edit_tensors(adapter, lambda t: [x.mul_(1e4) for x in t.values()], "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"q_proj.weight: the merged values are not finite in torch.float16"):
            surgery.merge(adapter, llama, tmp_path / "merged", dtype="float16")
        assert not (tmp_path / "merged").exists()

    def test_unknown_dtype(self, adapter, llama, tmp_path: Path) -> None:
        with pytest.raises(MethodError, match="unknown dtype 'int8'"):
            surgery.merge(adapter, llama, tmp_path / "merged", dtype="int8")


class TestFolder:
    """The output appears whole or not at all, and holds what belongs to the result."""

    @pytest.fixture
    def base(self, llama: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(llama, folder)
        for name in ("tokenizer.json", "chat_template.jinja", "1_Pooling/config.json", "pytorch_model.bin", "m.gguf"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        (folder / ".git").mkdir()
        (folder / ".git" / "config").write_text("")
        return folder

    @pytest.fixture
    def adapter(self, llama: Path, tmp_path: Path) -> Path:
        return trained(load_base(llama), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "lora")

    def test_other_files_are_copied_but_for_other_weights(self, adapter, base, tmp_path: Path) -> None:
        report = surgery.merge(adapter, base, tmp_path / "merged")
        found = contents(tmp_path / "merged")
        assert {"tokenizer.json", "chat_template.jinja", "1_Pooling/config.json", "generation_config.json"} < set(found)
        assert report.left_out == ["m.gguf", "pytorch_model.bin"] and not set(report.left_out) & set(found)
        assert not any(name.startswith(".git") for name in found)
        history = json.loads((tmp_path / "merged" / "surgery.json").read_text())
        assert history["command"] == "merge" and history["base"] == "base" and str(tmp_path) not in json.dumps(history)

    def test_dry_run_says_the_size_and_writes_nothing(self, adapter, base, tmp_path: Path) -> None:
        before = contents(tmp_path)
        planned = surgery.merge(adapter, base, tmp_path / "merged", dry_run=True)
        assert contents(tmp_path) == before and planned.out is None and planned.dry_run
        written = surgery.merge(adapter, base, tmp_path / "merged")
        assert planned.parameters == written.parameters and 0 < written.bytes - planned.bytes < 1e4  # the header

    def test_existing_output_needs_force(self, adapter, base, tmp_path: Path) -> None:
        surgery.merge(adapter, base, tmp_path / "merged")
        with pytest.raises(OutputError, match="--force"):
            surgery.merge(adapter, base, tmp_path / "merged")
        surgery.merge(adapter, base, tmp_path / "merged", force=True, dtype="bfloat16")
        assert set(surgery.inspect(tmp_path / "merged").dtypes) == {"bfloat16"}

    @pytest.mark.parametrize("where", ["base", "lora", ".", "base/inside"])
    def test_inputs_are_never_replaced(self, where: str, adapter, base, tmp_path: Path) -> None:
        before = contents(tmp_path)
        with pytest.raises(OutputError, match="choose another output"):
            surgery.merge(adapter, base, tmp_path / where, force=True)
        assert contents(tmp_path) == before

    def test_a_corrupted_write_is_caught(self, adapter, base, tmp_path: Path, monkeypatch) -> None:
        original = merged_folder.write_file

        def corrupting(path: Path, *arguments: Any) -> Any:
            digests = original(path, *arguments)
            with path.open("r+b") as file:
                file.seek(-3, 2)
                file.write(b"\x55")
            return digests

        monkeypatch.setattr(merged_folder, "write_file", corrupting)
        before = contents(tmp_path)
        with pytest.raises(OutputError, match="read back differs"):
            surgery.merge(adapter, base, tmp_path / "merged")
        assert contents(tmp_path) == before

    def test_an_interruption_leaves_nothing(self, adapter, base, tmp_path: Path) -> None:
        def interrupt(done: int, total: int, what: str) -> None:
            if done == 3:
                raise KeyboardInterrupt

        before = contents(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            surgery.merge(adapter, base, tmp_path / "merged", progress=interrupt)
        assert contents(tmp_path) == before

    def test_a_full_disk_is_seen_before_any_work(self, adapter, base, tmp_path: Path, monkeypatch) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(merged_folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OutputError, match="1000 B left"):
            surgery.merge(adapter, base, tmp_path / "merged")

    def test_progress_names_the_files(self, adapter, base, tmp_path: Path) -> None:
        seen: list[tuple[int, int, str]] = []
        surgery.merge(adapter, base, tmp_path / "merged", progress=lambda *step: seen.append(step))
        assert [done for done, _, _ in seen] == list(range(1, seen[0][1] + 1)) and seen[0][2] == "model.safetensors"

    def test_tied_and_fresh_tensors_go_into_the_last_shard(self, model_folder, tmp_path: Path) -> None:
        base = model_folder("llama-bf16-sharded")
        model = tf.LlamaForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
        adapter = trained(model, config, tmp_path / "lora")
        report = surgery.merge(adapter, base, tmp_path / "merged")
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        assert report.added == ["score.weight"] and index["weight_map"]["score.weight"] == report.files[-1]
        sizes = [t.nbytes for file in report.files for t in load_file(tmp_path / "merged" / file).values()]
        assert index["metadata"]["total_size"] == sum(sizes)
        opened = tf.LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert opened.config.num_labels == 3


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


class TestCommand:
    """`surgery merge` in the terminal."""

    @pytest.fixture
    def adapter(self, llama: Path, tmp_path: Path) -> Path:
        return trained(load_base(llama), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "lora")

    def test_the_summary_says_what_was_done(self, adapter, llama, tmp_path: Path) -> None:
        result = invoke("merge", adapter, "--base", llama, "-o", tmp_path / "merged", "-v")
        assert result.exit_code == 0
        for words in ("as LlamaForCausalLM", "LORA, 3 layers", "|dW|", f"written  {tmp_path / 'merged'}"):
            assert words in result.stdout
        assert "model.layers.2.self_attn.q_proj" in result.stdout

    def test_json_is_all_there_is_on_stdout(self, adapter, llama, tmp_path: Path) -> None:
        result = invoke("merge", adapter, "--base", llama, "-o", tmp_path / "merged", "--json")
        found = json.loads(result.stdout)
        assert {"command", "out", "bytes", "seconds", "modules", "peft_type", "trainable_parameters"} <= set(found)
        assert found["command"] == "merge" and found["modules"] == 3 and len(found["sites"]) == 3

    def test_the_default_output_is_named_after_the_adapter(self, adapter, llama, tmp_path, monkeypatch) -> None:
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        assert invoke("merge", adapter, "--base", llama, "-q").stdout == "lora-merged\n"
        assert (tmp_path / "work" / "lora-merged" / "config.json").is_file()

    def test_an_untrained_adapter_is_said_to_change_nothing(self, llama: Path, tmp_path: Path) -> None:
        surgery.init(llama, "inilora", tmp_path / "start")
        result = invoke("merge", tmp_path / "start", "--base", llama, "-o", tmp_path / "merged")
        assert "changes no weight" in result.stderr and "change   none" in result.stdout

    def test_wrong_input_is_one_line_and_exit_1(self, adapter, llama, tmp_path: Path) -> None:
        for words in ([tmp_path / "nowhere", "--base", llama], [adapter, "--base", adapter], [llama, "--base", llama]):
            result = invoke("merge", *words, "-o", tmp_path / "merged")
            assert result.exit_code == 1 and result.stdout == ""
            assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
        assert invoke("merge", adapter).exit_code == 2


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
