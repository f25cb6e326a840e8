"""What `surgery.compare` says equals dense differences in float64 and what PEFT's models answer."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file

import surgery
from surgery.comparison.cost import bytes_of, loaded_cost
from surgery.comparison.pair import Pair
from surgery.deltas.operators import Delta
from surgery.deltas.products import HadamardProduct
from surgery.errors import AdapterError, DataError, MethodError, OutputError, SurgeryError, WrongBaseError
from surgery.methods.registry import method_info, method_infos
from tests.adapters.test_stock_types import randomise
from tests.helpers.command_line import contents, flags, invoke
from tests.helpers.models import build, edit_tensors, llama_config, load_base, start_options
from tests.helpers.texts import save_tokenizer, text_rows, write_rows
from tests.initialization.test_init import perturb
from tests.merging.test_merge import STOCK, TARGETS, tied_llama, trained

FILE = "adapter_model.safetensors"
LORA = peft.LoraConfig
TRAINS = ("lora_B.weight", "w1_b", "w2", "w2_b", "hira_B", "randlora_lambda", "vera_lambda_b")
OWN = [info.name for info in method_infos() if info.own_type]


def lora(folder: Path, out: Path, scale: float = 1.0, **options: Any) -> Path:
    """A LoRA saved by PEFT; `scale` makes its B another."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
    made = trained(load_base(folder), LORA(**{**settings, **options}), out)
    edit_tensors(made, lambda tensors: [t.mul_(scale) for name, t in tensors.items() if "lora_B" in name], FILE)
    return made


@pytest.fixture
def pair(llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two LoRAs of other ranks; the second leaves a role alone and changes another."""
    a = lora(llama, tmp_path / "a", task_type="CAUSAL_LM")
    b = lora(llama, tmp_path / "b", 0.3, r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    return a, b


@pytest.fixture
def texts(llama: Path, tmp_path: Path) -> Path:
    """Texts for the tiny Llama, which gets a tokenizer."""
    if not (llama / "tokenizer.json").exists():
        save_tokenizer(llama)
    return write_rows(tmp_path / "texts.jsonl", text_rows(11))


def dense(folder: Path, base: Path | None = None) -> dict[str, torch.Tensor]:
    """Every layer's weight change in float64: from PEFT's merge of the opened adapter."""
    model = surgery.load(folder, load_base(base))
    before = {name: tensor.clone() for name, tensor in load_base(base).double().state_dict().items()}
    merged = model.double().merge_and_unload()
    found = {}
    for name, tensor in merged.state_dict().items():
        change = tensor - before[name] if name in before and tensor.shape == before[name].shape else tensor
        if name.endswith(".weight") and tensor.ndim == 2 and float(change.abs().max()) > 0:
            found[name.removesuffix(".weight")] = change
    return found


def check_weights(found: surgery.Comparison, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """All weight errors, against dense differences."""
    assert {site.module for site in found.sites} == set(ours) | set(theirs)
    lost = energy = 0.0
    for site in found.sites:
        first, second = ours.get(site.module), theirs.get(site.module)
        zero = torch.zeros_like(first if first is not None else second)
        first, second = (zero if each is None else each for each in (first, second))
        assert site.norm_a == pytest.approx(float(first.norm()), rel=1e-5)
        assert site.norm_b == pytest.approx(float(second.norm()), rel=1e-5)
        assert site.difference == pytest.approx(float((first - second).norm()), rel=1e-4)
        if site.norm_a:
            assert site.weight_error == pytest.approx(float((first - second).norm() / first.norm()), rel=1e-4)
        else:
            assert site.weight_error is None
        lost += float((first - second).square().sum())
        energy += float(first.square().sum())
    assert found.weight_error == pytest.approx(math.sqrt(lost / energy), rel=1e-4)


# Weights


def test_two_loras(pair, llama: Path) -> None:
    a, b = pair
    found = surgery.compare(a, b)
    check_weights(found, dense(a, llama), dense(b, llama))
    roles = {site.role: site for site in found.sites}
    q, down, up = (roles[f"model.layers.*.{name}_proj"] for name in ("self_attn.q", "mlp.down", "mlp.up"))
    assert (q.rank_a, q.rank_b, down.rank_a, down.rank_b, up.rank_a, up.rank_b) == (3, 2, 3, None, None, 2)
    assert down.weight_error == 1.0 and up.weight_error is None
    assert (found.adapter_a.ranks, found.adapter_b.ranks, found.adapter_b.modules) == ([3], [2], 6)
    assert found.source_bytes == (a / FILE).stat().st_size and found.bytes == (b / FILE).stat().st_size
    assert found.ratio == found.source_bytes / found.bytes
    assert found.adapter_a.parameters == sum(tensor.numel() for tensor in load_file(a / FILE).values())
    assert found.base is None and found.items == 0 and found.output_error is found.kl is found.latency is None
    assert sum("alone" in line for line in found.notes) == 2
    assert {site.layer for site in found.sites} == {0, 1, 2}
    # A is the reference: the other way round it is another figure.
    assert surgery.compare(b, a).weight_error != pytest.approx(found.weight_error, rel=1e-2)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "vit", "llama-bf16-sharded"])
def test_other_models(kind: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    for name, rank in (("a", 4), ("b", 2)):
        trained(load_base(folder), LORA(r=rank, target_modules=TARGETS[kind]), tmp_path / name)
    found = surgery.compare(tmp_path / "a", tmp_path / "b")
    on_base = surgery.compare(tmp_path / "a", tmp_path / "b", base=folder)
    assert on_base.weight_error == pytest.approx(found.weight_error, rel=1e-6) and found.weight_error > 0.1
    order = [name for name, _ in load_base(folder).named_modules()]
    modules = [site.module for site in on_base.sites]
    assert modules == sorted(modules, key=order.index) and set(modules) == {site.module for site in found.sites}


@pytest.mark.parametrize(
    ("first", "second"),
    [*(("lora", kind) for kind in STOCK), ("loha", "lokr"), ("hira", "hira"), ("vera", "randlora"), ("hira", "loha")],
)
def test_stock_types(first: str, second: str, llama: Path, tmp_path: Path) -> None:
    configs = {**STOCK, "lora": LORA(r=3)}
    for name, kind in (("a", first), ("b", second)):
        config = configs[kind].__class__(**{**configs[kind].to_dict(), "peft_type": None, "target_modules": ["q_proj"]})
        trained(load_base(llama), config, tmp_path / name)
    # Of another size, lest a type be compared with its like.
    edit_tensors(tmp_path / "b", lambda t: [v.mul_(0.5) for name, v in t.items() if name.endswith(TRAINS)], FILE)
    found = surgery.compare(tmp_path / "a", tmp_path / "b", base=llama)
    check_weights(found, dense(tmp_path / "a", llama), dense(tmp_path / "b", llama))
    on_base = {"hira", "randlora", "vera", "vera from its seed"} & {first, second}
    if on_base:
        with pytest.raises(AdapterError, match=r"depends on its base model: give it with --base"):
            surgery.compare(tmp_path / "a", tmp_path / "b")
    else:
        assert surgery.compare(tmp_path / "a", tmp_path / "b").weight_error == pytest.approx(found.weight_error)


def start(method: str, base: Path, out: Path, store: bool = True) -> Path:
    """An adapter of ours that has been trained, as `save_pretrained` leaves it."""
    options = {"store_bases": False} if not store else {}
    rank = {} if method == "frod" else {"rank": 4}
    surgery.init(base, method, out.with_name(f"{out.name}-start"), **start_options(method, "llama"), **rank, **options)
    model = surgery.load(out.with_name(f"{out.name}-start"), load_base(base), is_trainable=True)
    perturb(model)
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("method", OWN)
def test_own_types(method: str, llama: Path, tmp_path: Path) -> None:
    """Against a LoRA, and against itself: nothing, to the last bit, though its parts are regenerated."""
    own = start(method, llama, tmp_path / "own")
    other = lora(llama, tmp_path / "lora", target_modules="all-linear")
    found = surgery.compare(own, other, base=llama)
    check_weights(found, dense(own, llama), dense(other, llama))
    itself = surgery.compare(own, own, base=llama)
    assert itself.weight_error == 0 and {site.weight_error for site in itself.sites} == {0.0}


@pytest.mark.parametrize("method", [name for name in OWN if "store_bases" in method_info(name).options])
def test_bases_that_are_not_stored(method: str, llama: Path, tmp_path: Path) -> None:
    bare = start(method, llama, tmp_path / "bare", store=False)
    other = lora(llama, tmp_path / "lora", target_modules="all-linear")
    check_weights(surgery.compare(other, bare, base=llama), dense(other, llama), dense(bare, llama))
    assert surgery.compare(bare, bare, base=llama).weight_error == 0
    with pytest.raises(AdapterError, match="--base"):
        surgery.compare(other, bare)


def test_an_adapter_and_its_copy_differ_by_nothing(pair, tmp_path: Path) -> None:
    a, _ = pair
    shutil.copytree(a, tmp_path / "copy")
    found = surgery.compare(a, tmp_path / "copy")
    assert found.weight_error == 0 and {site.difference for site in found.sites} == {0.0} and found.ratio == 1
    opened = [surgery.Adapter.open(each) for each in (a, tmp_path / "copy")]
    pair = Pair.open(*opened, None, None, torch.device("cpu"), False)
    assert pair.same and all(ours is theirs for _, ours, theirs in pair.deltas(None))
    # Controls: the same tensors under another scale; one number moved by one unit of its last place.
    config = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    (tmp_path / "copy" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 10}))
    assert surgery.compare(a, tmp_path / "copy").weight_error == pytest.approx(1.0)
    (tmp_path / "copy" / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(tmp_path / "copy", lambda t: t[name][0, 0].mul_(1 + 2e-7), FILE)
    moved = surgery.compare(a, tmp_path / "copy")
    assert 0 < moved.weight_error < 1e-6 and sum(site.difference > 0 for site in moved.sites) == 1


def test_nearly_equal_changes_do_not_cancel(llama: Path, tmp_path: Path) -> None:
    """A difference of 1e-6 is told to three digits: Gram matrices of the factors in float32 would lose it."""
    a = lora(llama, tmp_path / "a")
    b = tmp_path / "b"
    shutil.copytree(a, b)
    edit_tensors(b, lambda tensors: [t.mul_(1 + 1e-6) for name, t in tensors.items() if "lora_B" in name], FILE)
    first, second = (load_file(each / FILE) for each in (a, b))
    lost = energy = 0.0
    for name in first:
        if "lora_B" in name:
            A = first[name.replace("lora_B", "lora_A")].double()
            lost += float(((first[name].double() - second[name].double()) @ A).square().sum())
            energy += float((first[name].double() @ A).square().sum())
    assert surgery.compare(a, b).weight_error == pytest.approx(math.sqrt(lost / energy), rel=1e-3)


def test_no_matrix_as_large_as_a_weight_is_formed(pair, llama: Path, texts: Path, monkeypatch) -> None:
    def refuse(delta: Delta) -> torch.Tensor:
        raise AssertionError("a dense change was formed")

    for kind in (surgery.deltas.operators.LowRank, surgery.deltas.operators.Sum):
        monkeypatch.setattr(kind, "dense", refuse)
    surgery.compare(*pair)
    surgery.compare(*pair, base=llama, data=texts, latency=False)
    monkeypatch.setattr(HadamardProduct, "factors", lambda delta: None)  # a control: a type without factors needs it
    with pytest.raises(AssertionError, match="dense"):
        first = surgery.deltas.operators.LowRank(torch.ones(2, 1), torch.ones(1, 2))
        HadamardProduct(first, first).minus(first).norm()


def test_a_start_that_changes_nothing(pair, llama: Path, tmp_path: Path) -> None:
    a, _ = pair
    peft.get_peft_model(load_base(llama), LORA(target_modules=["q_proj"])).save_pretrained(tmp_path / "start")
    found = surgery.compare(tmp_path / "start", a)
    assert found.weight_error is None and "A changes no weight: it is at its start, where dW = 0" in found.notes
    assert all(site.weight_error is None for site in found.sites)
    back = surgery.compare(a, tmp_path / "start")
    assert [back.weight_error, *(site.weight_error for site in back.sites)] == pytest.approx([1.0] * 7)
    assert surgery.compare(tmp_path / "start", tmp_path / "start").weight_error == 0
    json.dumps(found.to_dict(), allow_nan=False)


# Names, bases and what is brought whole


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


def test_a_bias_of_loras_b(llama: Path, texts: Path, tmp_path: Path) -> None:
    """It is no weight change: it is compared among what is brought whole, and is there when the model answers."""
    a = lora(llama, tmp_path / "a", target_modules=["q_proj"], lora_bias=True)
    b = tmp_path / "b"
    shutil.copytree(a, b)
    edit_tensors(b, lambda t: [v.mul_(-1) for name, v in t.items() if name.endswith("lora_B.bias")], FILE)
    found = surgery.compare(a, b, base=llama, data=texts, latency=False)
    assert found.weight_error == 0 and {each.difference for each in found.carried} == {2.0}
    assert found.kl > 0 and found.output_error > 0
    assert found.kl == pytest.approx(expected_kl(a, b, llama, texts), rel=1e-4)


# With data


def logits(folder: Path | None, base: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """What PEFT's model answers, text by text, in float64: every token but the last, or the class."""
    model = PeftModel.from_pretrained(base, folder).eval() if folder is not None else base
    rows = []
    with torch.no_grad():
        for text in texts:
            output = model(**tokenizer(text, return_tensors="pt")).logits.double()
            rows.append(output[0, :-1] if output.ndim == 3 else output)
    return torch.cat(rows)


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def expected_kl(a: Path, b: Path, base: Path, texts: Path) -> float:
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    return divergence(*(logits(each, load_base(base), tokenizer, read_texts(texts)) for each in (a, b)))


def test_language_models(pair, llama: Path, texts: Path) -> None:
    a, b = pair
    found = surgery.compare(a, b, base=llama, data=texts, batch_size=4, latency=False)
    tokenizer = tf.AutoTokenizer.from_pretrained(llama)
    p, q, bare = (logits(each, load_base(llama), tokenizer, read_texts(texts)) for each in (a, b, None))
    assert (found.items, found.unit, found.model_class) == (len(p), "token", "LlamaForCausalLM")
    assert found.kl == pytest.approx(divergence(p, q), rel=1e-4) and found.kl > 1e-3
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    labels = torch.cat([torch.tensor(tokenizer(text)["input_ids"][1:]) for text in read_texts(texts)])
    assert found.scores.name == "perplexity"
    for value, rows in ((found.scores.a, p), (found.scores.b, q), (found.scores.base, bare)):
        assert value == pytest.approx(math.exp(-rows.log_softmax(-1).gather(1, labels[:, None]).mean()), rel=1e-4)
    check_weights(found, dense(a, llama), dense(b, llama))
    assert found.output_error and all(s.output_error is None for s in found.sites if "up_proj" in s.module)
    assert {s.output_error for s in found.sites if "down_proj" in s.module} == {1.0}


def test_an_adapter_beside_itself_with_data(pair, llama: Path, texts: Path, tmp_path: Path) -> None:
    a, _ = pair
    shutil.copytree(a, tmp_path / "copy")
    found = surgery.compare(a, tmp_path / "copy", base=llama, data=texts, latency=False)
    assert (found.weight_error, found.output_error, found.kl, found.agreement) == (0, 0, 0, 1)
    assert {site.output_error for site in found.sites} == {0.0}
    assert found.scores.a == found.scores.b != found.scores.base


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora on the head", "head saved whole", "embedding saved whole"],
)
def test_tied_weights(options: dict[str, Any], tmp_path: Path) -> None:
    """Under PEFT a change of one of two tied weights leaves the other as it is."""
    folder = save_tokenizer(tied_llama(tmp_path / "tied"))
    data = write_rows(tmp_path / "texts.jsonl", text_rows(7))
    for name in "ab":
        lora(folder, tmp_path / name, 1 if name == "a" else 0.3, r=2, task_type="CAUSAL_LM", **options)
    # What PEFT stores of the head beside a LoRA on it is the base's own weight.
    part = "lm_head.lora_" if "lm_head" in options["target_modules"] else options["modules_to_save"][0]
    edit_tensors(tmp_path / "b", lambda t: [v.mul_(1.1) for name, v in t.items() if part in name], FILE)
    found = surgery.compare(tmp_path / "a", tmp_path / "b", base=folder, data=data, latency=False, batch_size=3)
    assert found.kl == pytest.approx(expected_kl(tmp_path / "a", tmp_path / "b", folder, data), rel=1e-4)
    assert found.kl > 1e-3
    bare = logits(None, load_base(folder), tf.AutoTokenizer.from_pretrained(folder), read_texts(data))
    labels = [torch.tensor(tf.AutoTokenizer.from_pretrained(folder)(t)["input_ids"][1:]) for t in read_texts(data)]
    perplexity = math.exp(-bare.log_softmax(-1).gather(1, torch.cat(labels)[:, None]).mean())
    assert found.scores.base == pytest.approx(perplexity, rel=1e-4)


CLASSES = 5


@pytest.fixture
def classifiers(model_folder, tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """A bare BERT, two classifiers on it by PEFT with heads of their own, and labelled texts."""
    folder = tmp_path / "bert"
    shutil.copytree(model_folder("bert"), folder)
    save_tokenizer(folder, ends_texts=True)
    config = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    for name, rank, size in (("a", 3, 1.0), ("b", 2, 0.5)):
        base = tf.BertForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
        model = peft.get_peft_model(base, LORA(r=rank, **config))
        randomise(model)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.mul_(size if "lora_B" in key else 1)
        model.save_pretrained(tmp_path / name)
    rows = text_rows(12, labels=CLASSES)
    return folder, tmp_path / "a", tmp_path / "b", write_rows(tmp_path / "labelled.jsonl", rows)


def classifier(folder: Path, head: Path | None = None) -> Any:
    model = tf.BertForSequenceClassification.from_pretrained(folder, num_labels=CLASSES).eval()
    if head is not None:
        tensors = load_file(head / FILE)
        brought = {f"classifier.{name}": tensors[f"base_model.model.classifier.{name}"] for name in ("weight", "bias")}
        model.load_state_dict(brought, strict=False)
    return model


def test_classifiers_with_heads_of_their_own(classifiers, tmp_path: Path) -> None:
    """The label count is the head's, not the configuration's; the bare base is scored with A's head."""
    folder, a, b, data = classifiers
    found = surgery.compare(a, b, base=folder, data=data, latency=False)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    texts = read_texts(data)
    p, q = (logits(each, classifier(folder), tokenizer, texts) for each in (a, b))
    bare = logits(None, classifier(folder, a), tokenizer, texts)
    labels = torch.tensor([json.loads(line)["label"] for line in data.read_text().splitlines()])
    assert (found.items, found.unit) == (12, "sample") and found.model_class == "BertForSequenceClassification"
    assert found.kl == pytest.approx(divergence(p, q), rel=1e-4) and found.kl > 1e-3
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    scores = [float((rows.argmax(-1) == labels).double().mean()) for rows in (p, q, bare)]
    assert [found.scores.a, found.scores.b, found.scores.base] == pytest.approx(scores)
    assert found.scores.name == "accuracy"
    # A control for the base: with B's head it would be another model.
    assert not torch.allclose(bare, logits(None, classifier(folder, b), tokenizer, texts))
    # Without labels, and with labels that the model does not know, the rest is the same.
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": text} for text in texts])
    odd = write_rows(tmp_path / "odd.jsonl", [{"text": text, "label": "numpy"} for text in texts])
    for file in (plain, odd):
        other = surgery.compare(a, b, base=folder, data=file, latency=False)
        assert other.scores is None and other.kl == pytest.approx(found.kl, rel=1e-6)
        assert any("labels are left out" in line for line in other.notes) == (file == odd)


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


def test_embeddings(model_folder, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(model_folder("bert"), folder)
    save_tokenizer(folder, ends_texts=True)
    for name, rank in (("a", 3), ("b", 2)):
        trained(load_base(folder), LORA(r=rank, target_modules=["query", "dense"]), tmp_path / name)
    data = write_rows(tmp_path / "data.jsonl", text_rows(9))
    found = surgery.compare(tmp_path / "a", tmp_path / "b", base=folder, data=data, latency=False, batch_size=4)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    means = []
    for name in ("a", "b"):
        model = PeftModel.from_pretrained(load_base(folder), tmp_path / name).eval()
        with torch.no_grad():
            rows = [model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in read_texts(data)]
        means.append(torch.stack(rows).double())
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(*means).mean()), abs=1e-6)
    assert found.cosine_loss == 1 - found.cosine
    assert found.cosine < 0.99 and found.kl is None and found.scores is None


@pytest.mark.parametrize("method", OWN)
def test_own_types_answer_as_under_peft(method: str, llama: Path, texts: Path, tmp_path: Path) -> None:
    own = start(method, llama, tmp_path / "own")
    other = lora(llama, tmp_path / "lora", 0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    found = surgery.compare(other, own, base=llama, data=texts, latency=False)
    tokenizer = tf.AutoTokenizer.from_pretrained(llama)
    p = logits(other, load_base(llama), tokenizer, read_texts(texts))
    q = logits(None, surgery.load(own, load_base(llama)).eval(), tokenizer, read_texts(texts))
    assert found.kl == pytest.approx(divergence(p, q), rel=1e-3) and found.kl > 1e-3


def test_a_change_that_depends_on_a_transposed_weight(model_folder, tmp_path: Path) -> None:
    """GPT-2 stores its weights `(in, out)`; HiRA multiplies them."""
    folder = tmp_path / "gpt2"
    shutil.copytree(model_folder("gpt2"), folder)
    save_tokenizer(folder)
    data = write_rows(tmp_path / "texts.jsonl", text_rows(6))
    for name, rank in (("a", 3), ("b", 2)):
        config = peft.HiraConfig(r=rank, target_modules=["c_attn", "mlp.c_proj"], task_type="CAUSAL_LM")
        trained(load_base(folder), config, tmp_path / name)
    found = surgery.compare(tmp_path / "a", tmp_path / "b", base=folder, data=data, latency=False)
    assert found.kl == pytest.approx(expected_kl(tmp_path / "a", tmp_path / "b", folder, data), rel=1e-4)
    assert found.kl > 1e-3


def test_one_copy_of_the_base_is_loaded(pair, llama: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    original = tf.LlamaForCausalLM.from_pretrained.__func__

    def counted(cls: Any, *args: Any, **options: Any) -> Any:
        loads.append(args)
        return original(cls, *args, **options)

    monkeypatch.setattr(tf.LlamaForCausalLM, "from_pretrained", classmethod(counted))
    surgery.compare(*pair, base=llama, data=texts)
    assert len(loads) == 1


# Time and memory


def test_costs(pair, llama: Path, texts: Path) -> None:
    """Times are per token; memory is what PEFT's layers hold, one form at a time on the same model."""
    a, b = pair
    costs = surgery.compare(a, b, base=llama, data=texts, batch_size=4).latency
    assert costs is not None and costs.unit == "token" and costs.batch_size == 4
    assert costs.base.bytes == bytes_of(load_base(llama))
    for cost, folder in ((costs.a, a), (costs.b, b)):
        assert cost.bytes == sum(tensor.nbytes for tensor in load_file(folder / FILE).values())
    assert all(0 < cost.batch < 1 and 0 < cost.one < 1 for cost in (costs.base, costs.a, costs.b))


def test_times_are_medians_for_each_token(pair, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock under control: of six runs the first does not count, and the others' median is 2, their mean 2.4."""
    seconds = itertools.cycle([9.0, 1.0, 2.0, 3.0, 5.0, 1.0])
    monkeypatch.setattr("surgery.comparison.cost._timed", lambda model, inputs: next(seconds))
    model = load_base(llama)
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}
    cost = loaded_cost(model, None, [(batch, 10), (batch, 10)])
    assert cost.one == cost.batch == 0.2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded_cost(model, surgery.Adapter.open(pair[0]), [(batch, 10), (batch, 10)])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # taken off again
    assert before.keys() == model.state_dict().keys()


def test_costs_of_types_that_are_unpacked_in_memory(llama: Path, texts: Path, tmp_path: Path) -> None:
    """A compact file is not a small adapter in memory: a base that is not stored is regenerated there."""
    bare = start("frod", llama, tmp_path / "bare", store=False)
    vera = trained(load_base(llama), peft.VeraConfig(r=16, save_projection=False, target_modules=["q_proj"]),
                   tmp_path / "vera")  # fmt: skip
    found = surgery.compare(bare, vera, base=llama, data=texts)
    for cost, size in ((found.latency.a, found.source_bytes), (found.latency.b, found.bytes)):
        assert cost.bytes > size


def test_memory_is_counted_once_for_tensors_of_several_names() -> None:
    model = build("t5")  # its embeddings are shared
    assert bytes_of(model) == sum(parameter.nbytes for parameter in model.parameters())


# Pictures, errors, the command line


def test_picture(pair, llama: Path, texts: Path, tmp_path: Path) -> None:
    target = tmp_path / "errors.png"
    found = surgery.compare(*pair, plot=target)
    assert found.out == str(target) and target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 10_000
    one = target.stat().st_size
    surgery.compare(*pair, base=llama, data=texts, latency=False, plot=target)
    assert target.stat().st_size > 1.2 * one  # two maps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "errors.png", "texts.jsonl"]


def test_picture_of_an_adapter_at_its_start(pair, llama: Path, tmp_path: Path) -> None:
    peft.get_peft_model(load_base(llama), LORA(target_modules=["q_proj"])).save_pretrained(tmp_path / "start")
    surgery.compare(tmp_path / "start", pair[0], plot=tmp_path / "start.svg")
    assert b"<svg" in (tmp_path / "start.svg").read_bytes()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"data": "texts.jsonl"}, MethodError, "give the base model"),
        ({"dtype": "float64"}, MethodError, "float32, bfloat16"),
        ({"base": "BASE", "data": "TEXTS", "samples": 0}, MethodError, "samples must be at least 1"),
        ({"base": "BASE", "data": "TEXTS", "max_length": 1}, DataError, "at least 2"),
        ({"base": "BASE", "data": "missing.jsonl"}, DataError, "no such data file"),
        ({"plot": "errors.txt"}, MethodError, "ends with"),
        ({"plot": "nowhere/errors.png"}, OutputError, "does not exist"),
        ({"device": "tpu"}, MethodError, "device"),
    ],
)
def test_errors(options: dict[str, Any], kind: type[SurgeryError], message: str, pair, llama, texts) -> None:
    places = {"BASE": llama, "TEXTS": texts}
    given = {name: places.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(kind, match=message):
        surgery.compare(*pair, **given)


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(pair, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("surgery.comparison.compare.Pair.open", lambda *args: pytest.fail("worked first"))
    for target in (tmp_path / "nowhere" / "x.png", tmp_path / "x.txt", tmp_path):
        with pytest.raises(SurgeryError):
            surgery.compare(*pair, plot=target)
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(OutputError, match="may not be written"):
        surgery.compare(*pair, plot=tmp_path / "x.png")


def test_command_equals_library_call(pair, llama: Path, texts: Path) -> None:
    options = {"base": llama, "data": texts, "batch_size": 4, "samples": 8, "seed": 3}
    result = invoke("compare", *pair, *flags(**options), "--no-latency", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    library = surgery.compare(*pair, **options, latency=False).to_dict()
    assert report.pop("seconds") > 0 and library.pop("seconds") > 0
    for path in ("a", "b", "base"):
        library[path] = str(library[path])
    assert report == json.loads(json.dumps(library))
    assert {"command", "a", "b", "base", "weight_error", "output_error", "agreement", "kl"} <= set(report)
    assert {"source_bytes", "bytes", "ratio", "sites"} <= set(report) and report["command"] == "compare"
    assert {"module", "rank_a", "rank_b", "weight_error", "output_error"} <= set(report["sites"][0])


def test_what_is_shown(pair, llama: Path, texts: Path) -> None:
    plain = invoke("compare", *pair)
    assert plain.stderr.count("Note:") == 2
    assert "model.layers.*.mlp.down_proj" in plain.stdout and "output error" not in plain.stdout
    assert "LORA, 6 layers, rank 3" in plain.stdout and "weight error" in plain.stdout
    verbose = invoke("compare", *pair, "-v").stdout
    rows = [line.split() for line in verbose.splitlines() if line.startswith("model.layers.")]
    assert len(rows) == 9 and all("up_proj" in row[0] for row in rows[:3])  # what only B changes leads
    errors = [float(row[-1].rstrip("%")) for row in rows[3:]]
    assert errors == sorted(errors, reverse=True)
    quiet = invoke("compare", *pair, "-q")
    assert quiet.stderr == "" and quiet.stdout.count("\n") == 1 and quiet.stdout.startswith("weight error ")
    whole = invoke("compare", *pair, *flags(base=llama, data=texts)).stdout
    for words in ("KL(A || B)", "agreement", "perplexity", "output error", "µs / token", "not a faster model"):
        assert words in whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x.jsonl"], "--base MODEL"),
        (["--samples", "4"], "--samples"),
        (["--no-latency", "--max-length", "9"], "--max-length, --no-latency"),
        (["--task", "causal-lm"], "--base MODEL"),
        (["--dtype", "float16"], "float16"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, pair) -> None:
    result = invoke("compare", *pair, *arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_a_named_error_is_one_line(pair, tmp_path: Path) -> None:
    before = contents(tmp_path)
    result = invoke("compare", pair[0], tmp_path / "missing")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and result.stderr.startswith("Error: ")
    assert contents(tmp_path) == before


def test_progress(pair, llama: Path, texts: Path) -> None:
    told: list[tuple[int, int, str]] = []
    surgery.compare(*pair, base=llama, data=texts, batch_size=4, latency=False, progress=lambda *a: told.append(a))
    assert [each[:2] for each in told] == [*((n, 9) for n in range(1, 10)), (4, 11), (8, 11), (11, 11)]


def test_opened_adapters(pair, llama: Path, texts: Path) -> None:
    """Adapters that were never a folder are compared, and loaded, as well."""
    opened = [surgery.Adapter(each.config, each.tensors) for each in map(surgery.Adapter.open, pair)]
    found = surgery.compare(*opened, base=llama, data=texts)
    expected = surgery.compare(*pair, base=llama, data=texts)
    assert (found.a, found.b) == ("A", "B") and found.kl == expected.kl
    assert found.weight_error == expected.weight_error and found.bytes == expected.bytes
    assert found.latency.a.bytes == expected.latency.a.bytes
