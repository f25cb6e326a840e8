"""What `surgery.compare` says equals dense differences in float64 and what PEFT's models answer."""

from __future__ import annotations

import json
import math
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
from surgery.comparison.pair import Pair
from surgery.deltas.operators import Delta
from surgery.deltas.products import HadamardProduct
from surgery.errors import AdapterError, DataError, MethodError, OutputError, SurgeryError
from surgery.methods.registry import method_info, method_infos
from tests.helpers.comparisons import (
    FILE,
    LORA,
    classifier,
    divergence,
    logits,
    lora,
    read_texts,
    start,
)
from tests.helpers.merges import STOCK, TARGETS, tied_llama, trained
from tests.helpers.models import edit_tensors, load_base
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

TRAINS = ("lora_B.weight", "w1_b", "w2", "w2_b", "hira_B", "randlora_lambda", "vera_lambda_b")
OWN = [info.name for info in method_infos() if info.own_type]


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


def test_opened_adapters(pair, llama: Path, texts: Path) -> None:
    """Adapters that were never a folder are compared, and loaded, as well."""
    opened = [surgery.Adapter(each.config, each.tensors) for each in map(surgery.Adapter.open, pair)]
    found = surgery.compare(*opened, base=llama, data=texts)
    expected = surgery.compare(*pair, base=llama, data=texts)
    assert (found.a, found.b) == ("A", "B") and found.kl == expected.kl
    assert found.weight_error == expected.weight_error and found.bytes == expected.bytes
    assert found.latency.a.bytes == expected.latency.a.bytes
