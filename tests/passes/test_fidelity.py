"""Two adapters on one loaded model answer as PEFT's models do, sample by sample and without padding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft import PeftModel

import surgery
from surgery.deltas.operators import LowRank
from surgery.errors import AdapterError, MethodError
from surgery.models.sites import linear_sites
from surgery.passes.examples import Examples
from surgery.passes.fidelity import Applied, Fidelity, fidelity
from tests.helpers.merges import TARGETS, trained
from tests.helpers.models import VOCAB, build, load_base, ragged, spread

KINDS = ["llama", "gpt2", "t5", "vit", "bert"]
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def applied_from(folder: Path) -> Applied:
    """A saved LoRA by the model's names."""
    adapter = surgery.Adapter.open(folder)
    return Applied({module: adapter.delta(module) for module in adapter.modules})


@pytest.fixture
def case(model_folder, tmp_path: Path) -> Callable[[str], Any]:
    """Function from a kind to a base folder, and two LoRAs of different ranks and layers in PEFT."""

    def make(kind: str) -> tuple[Path, Path, Path]:
        folder = model_folder(kind)
        targets = TARGETS[kind]
        for name, rank, chosen in (("a", 3, targets), ("b", 2, targets[:-1])):
            config = peft.LoraConfig(r=rank, lora_alpha=1 + rank, target_modules=chosen)
            trained(load_base(folder), config, tmp_path / name)
        return folder, tmp_path / "a", tmp_path / "b"

    return make


def alone(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[None] for name, value in sample.items()}


def answers(model: Any, sample: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The rows that count for one sample: predictions of labelled tokens, of the class, or the mean hidden state."""
    batch = alone(sample)
    with torch.no_grad():
        output = model(**(batch if kind == "t5" else {n: v for n, v in batch.items() if n != "labels"}))
    if kind == "bert":
        return output.last_hidden_state[0].double().mean(0, keepdim=True)
    logits = output.logits[0].double()
    if kind == "vit":
        return logits[None]
    if kind == "t5":
        return logits
    wanted = sample["labels"][1:] != -100
    return logits[:-1][wanted]


def truth(sample: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    if kind in {"vit", "t5"}:
        return sample["labels"].reshape(-1)
    labels = sample["labels"][1:]
    return labels[labels != -100]


def expected(folder: Path, adapter: Path | None, examples: Examples, kind: str) -> torch.Tensor:
    model = load_base(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return torch.cat([answers(model, sample, kind) for sample in examples.features])


def measured(kind: str, folder: Path, a: Path, b: Path, batch_size: int = 3) -> Fidelity:
    model = load_base(folder)
    ours, theirs = applied_from(a), applied_from(b)
    return fidelity(model, ragged(kind), ours, theirs, batch_size, bare=Applied(), layers=True)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_peft(kind: str, case) -> None:
    folder, a, b = case(kind)
    found = measured(kind, folder, a, b)
    p, q, bare = (expected(folder, each, ragged(kind), kind) for each in (a, b, None))
    assert found.items == len(p)
    assert found.unit == ("sample" if kind in {"vit", "bert"} else "token")
    if kind == "bert":
        cosine = float(torch.cosine_similarity(p, q).mean())
        assert found.cosine == pytest.approx(cosine, abs=1e-6) and abs(cosine) < 0.99
        assert found.kl is None and found.agreement is None and found.scores is None
        return
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert found.kl == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    assert found.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    # A control: the divergence is not the same the other way round.
    assert found.kl != pytest.approx(float((log_q.exp() * (log_q - log_p)).sum(-1).mean()), rel=1e-3)
    labels = torch.cat([truth(sample, kind) for sample in ragged(kind).features])
    scores = found.scores
    assert scores is not None
    for value, rows in ((scores.reference, p), (scores.other, q), (scores.bare, bare)):
        if kind == "vit":
            assert value == float((rows.argmax(-1) == labels).double().mean())
        else:
            loss = -rows.log_softmax(-1).gather(1, labels[:, None]).mean()
            assert value == pytest.approx(math.exp(loss), rel=1e-4)
    assert scores.name == ("accuracy" if kind == "vit" else "perplexity")


@pytest.mark.parametrize("kind", KINDS)
def test_output_errors_are_those_of_the_inputs_second_moments(kind: str, case) -> None:
    """`sqrt(tr(R C R^T) / tr(dW C dW^T))` with C summed over samples without padding, in float64."""
    folder, a, b = case(kind)
    found = measured(kind, folder, a, b).layers
    model = PeftModel.from_pretrained(load_base(folder), a).eval()
    moments: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, args: Any) -> None:
            x = args[0].double().reshape(-1, args[0].shape[-1])
            moments[name] = moments.get(name, 0) + x.T @ x

        return see

    ours, theirs = (surgery.Adapter.open(each) for each in (a, b))
    for name in ours.modules:
        model.base_model.model.get_submodule(name).register_forward_pre_hook(hook(name))
    for sample in ragged(kind).features:
        answers(model, sample, kind)
    assert set(found) == set(ours.modules) and set(theirs.modules) < set(ours.modules)
    for name, C in moments.items():
        W = ours.delta(name).dense().double()
        R = W - theirs.delta(name).dense().double() if name in theirs.modules else W
        error = math.sqrt(float(torch.trace(R @ C @ R.T) / torch.trace(W @ C @ W.T)))
        assert found[name].error == pytest.approx(error, rel=1e-4), name
        assert found[name].energy == pytest.approx(float(torch.trace(W @ C @ W.T)), rel=1e-4)
        assert (error == 1) == (name not in theirs.modules)  # what B leaves alone counts in full


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_object_differs_by_nothing(kind: str, case) -> None:
    folder, a, _ = case(kind)
    model = load_base(folder)
    adapter = applied_from(a)
    found = fidelity(model, ragged(kind), adapter, adapter, 2, bare=Applied(), layers=True)
    assert {layer.error for layer in found.layers.values()} == {0.0}
    assert (found.kl, found.agreement, found.cosine) == ((None, None, 1.0) if kind == "bert" else (0.0, 1.0, None))
    assert found.scores is None or found.scores.reference == found.scores.other != found.scores.bare
    # A control: a thousandth more is seen.
    name = next(iter(adapter.deltas))
    B, A = adapter.deltas[name].factors()
    other = Applied({**adapter.deltas, name: LowRank(B * 1.001, A)})
    moved = fidelity(model, ragged(kind), adapter, other, 2, layers=True)
    assert moved.layers[name].error == pytest.approx(1e-3, rel=1e-2)
    assert moved.cosine is None or moved.cosine < 1
    assert moved.kl is None or moved.kl > 0


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_batches_do_not_matter(kind: str, case) -> None:
    folder, a, b = case(kind)
    one, all_at_once = (measured(kind, folder, a, b, size) for size in (1, 8))
    assert one.kl == pytest.approx(all_at_once.kl, rel=1e-4) and one.agreement == all_at_once.agreement
    for name, layer in one.layers.items():
        assert layer.energy == pytest.approx(all_at_once.layers[name].energy, rel=1e-5)
        assert layer.lost == pytest.approx(all_at_once.layers[name].lost, rel=1e-5)


def test_padding_of_a_decoder_as_long_as_the_encoder() -> None:
    """Prompts and answers of the same padded length but of other true lengths: each layer takes its own mask."""
    model = build("t5")
    generator = torch.Generator().manual_seed(0)
    features = []
    for given, answered in ((8, 3), (2, 8)):
        ids = torch.randint(3, VOCAB, (given,), generator=generator)
        labels = torch.randint(3, VOCAB, (answered,), generator=generator)
        features.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    examples = Examples(features, [1, 1], PADDING)
    deltas = {
        s.module: LowRank(torch.ones(s.out_features, 1), torch.ones(1, s.in_features)) for s in linear_sites(model)
    }
    adapter = Applied(deltas)
    one, both = (fidelity(model, examples, adapter, Applied(), size, layers=True).layers for size in (1, 2))
    assert set(one) == set(deltas)
    for name, layer in one.items():
        assert layer.energy == pytest.approx(both[name].energy, rel=1e-4), name


def test_the_model_is_left_as_it_was(case) -> None:
    folder, a, b = case("llama")
    model = load_base(folder).train()
    before = copy.deepcopy(model.state_dict())
    cache = model.config.use_cache
    fidelity(model, ragged("llama"), applied_from(a), applied_from(b), layers=True)
    assert model.training and model.config.use_cache == cache
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def number_model(outputs: int, problem: str | None) -> Any:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, num_labels=outputs, problem_type=problem,
    )  # fmt: skip
    model = tf.BertForSequenceClassification(config)
    spread(model)
    return model.eval()


@pytest.mark.parametrize(("outputs", "problem"), [(1, None), (3, "multi_label_classification")])
def test_outputs_that_are_numbers(outputs: int, problem: str | None) -> None:
    model = number_model(outputs, problem)
    examples = ragged("bert")
    wanted = torch.linspace(-1, 1, 5)
    if outputs == 1:
        for row, value in zip(examples.features, wanted, strict=True):
            row["labels"] = value
        examples.padding = {name: value for name, value in PADDING.items() if name != "labels"}
    heads = {"classifier.weight": torch.randn(outputs, 32, generator=torch.Generator().manual_seed(1))}
    found = fidelity(model, examples, Applied(), Applied({}, heads), 2)
    rows = []
    for carried in ({}, heads):
        changed = copy.deepcopy(model)
        changed.load_state_dict(carried, strict=False)
        inputs = [{n: v[None] for n, v in row.items() if n != "labels"} for row in examples.features]
        with torch.no_grad():
            rows.append(torch.cat([changed(**each).logits.double() for each in inputs]))
    error = float((rows[0] - rows[1]).square().mean())
    assert found.squared_error == pytest.approx(error, rel=1e-4) and error > 0.1
    assert found.kl is None and found.agreement is None
    if outputs == 1:
        assert found.scores is not None and found.scores.name == "squared error" and found.scores.bare is None
        assert found.scores.reference == pytest.approx(float((rows[0][:, 0] - wanted).square().mean()), rel=1e-4)
    else:
        assert found.scores is None


def test_what_the_base_is_scored_with() -> None:
    """The bare model carries what it is told to: the reference's head."""
    model = number_model(3, None)
    examples = ragged("bert")
    for index, row in enumerate(examples.features):
        row["labels"] = torch.tensor(index % 3)
    examples.padding = {name: value for name, value in PADDING.items() if name != "labels"}
    head = {"classifier.weight": torch.randn(3, 32, generator=torch.Generator().manual_seed(4)) * 3}
    reference = Applied({}, head)
    found = fidelity(model, examples, reference, Applied(), bare=Applied({}, head))
    assert found.scores is not None and found.scores.bare == found.scores.reference != found.scores.other


def test_many_classes_are_compared_some_rows_at_a_time(case, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, a, b = case("llama")
    whole = measured("llama", folder, a, b)
    monkeypatch.setattr("surgery.passes.fidelity.ROWS_AT_A_TIME", 2 * VOCAB)
    parts = measured("llama", folder, a, b)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-12) and parts.agreement == whole.agreement


def test_progress(case) -> None:
    folder, a, b = case("llama")
    model, told = load_base(folder), []
    fidelity(model, ragged("llama"), applied_from(a), applied_from(b), 2,
             progress=lambda *args: told.append(args))  # fmt: skip
    assert told == [(2, 5, "samples"), (4, 5, "samples"), (5, 5, "samples")]


def test_answers_that_are_not_finite_are_an_error(case) -> None:
    folder, a, _ = case("llama")
    model = load_base(folder)
    adapter = applied_from(a)
    huge = Applied({name: LowRank(*delta.factors(), 1e30) for name, delta in adapter.deltas.items()})
    with pytest.raises(MethodError, match="not finite"):
        fidelity(model, ragged("llama"), adapter, huge)


def test_an_adapter_that_does_not_fit(llama: Path) -> None:
    model = load_base(llama)
    with pytest.raises(AdapterError, match="no module"):
        fidelity(model, ragged("llama"), Applied(), Applied({"nothing": LowRank(torch.ones(2, 1), torch.ones(1, 2))}))
    with pytest.raises(AdapterError, match=r"lm_head\.weight"):
        fidelity(model, ragged("llama"), Applied(), Applied({}, {"lm_head.weight": torch.zeros(3, 3)}))


def test_a_model_whose_answers_are_of_another_kind() -> None:
    torch.manual_seed(0)
    model = tf.BertForQuestionAnswering(number_model(2, None).config)
    with pytest.raises(MethodError, match="QuestionAnswering"):
        fidelity(model, ragged("bert"), Applied(), Applied())


def test_a_causal_model_whose_class_is_named_otherwise() -> None:
    """Gemma 3 with its image tower is transformers' class for causal language modelling, too."""
    text = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=60)
    torch.manual_seed(0)
    model = tf.Gemma3ForConditionalGeneration(config).eval()
    spread(model)
    ids = torch.randint(3, 50, (9,), generator=torch.Generator().manual_seed(2))
    examples = Examples([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}], [1], PADDING)
    found = fidelity(model, examples, Applied(), Applied())
    with torch.no_grad():
        rows = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    loss = -rows[:-1].gather(1, ids[1:, None]).mean()
    assert found.items == 8 and found.scores is not None
    assert found.scores.reference == pytest.approx(math.exp(loss), rel=1e-5)
