"""The model card: metadata, figures, and a user's own text, which stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml

import surgery
from surgery.errors import HubError
from surgery.publishing.card import BEGIN, END, make_card, own_text
from surgery.publishing.checks import Checked
from tests.helpers.cards import BASE, REPO
from tests.helpers.hub import make_adapter
from tests.helpers.models import load_base


def checked(**changes: Any) -> Checked:
    """An adapter as the checks describe it."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **changes.pop("config", {})}
    values: dict[str, Any] = {
        "folder": Path("small"),
        "config": config,
        "provenance": {},
        "card": None,
        "base": BASE,
        "revision": None,
        "modules": 6,
        "parameters": 1344,
        "bytes": 6888,
        "carried": {},
    }
    return Checked(**{**values, **changes})


def front(card: str) -> dict[str, Any]:
    """A card's metadata."""
    return dict(yaml.safe_load(card.split("---\n")[1]))


CONVERTED = {
    "command": "convert",
    "source": {"peft_type": "LORA", "bytes": 137760},
    "data": "train.jsonl",
    "report": {"bytes": 6888, "weight_error": 0.01234, "output_error": 0.005, "kl": 0.0123, "agreement": 0.987},
}


def test_a_new_card() -> None:
    card = make_card(checked(), REPO, license="apache-2.0")
    assert front(card) == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{BASE}", "lora", "transformers"],
    }
    assert card.split("---\n", 2)[2].startswith(f"\n# small\n\n{BEGIN}\nA LoRA adapter for `{BASE}`")
    assert "[arXiv 2106.09685](https://arxiv.org/abs/2106.09685)" in card and card.endswith(f"{END}\n")
    assert "import surgery" not in card and "--to lora" not in card
    assert "license" not in front(make_card(checked(), REPO))


def test_what_a_conversion_lost_is_told() -> None:
    card = make_card(checked(config={"peft_type": "GIVA"}, provenance=CONVERTED), REPO, picture="plot.png")
    for line in (
        "| source | LORA | 134.5 KiB (137,760 bytes) |",
        "| this file | GIVA | 6.7 KiB (6,888 bytes) |",
        "| ratio | | 20.0 |",
        "Measured against the source, on `train.jsonl`:",
        "| error of the weight change | 1.23% |",
        "| error of the layers' outputs | 0.50% |",
        "| KL divergence of the predictions | 0.0123 nats |",
        "| predictions that agree | 98.70% |",
        "![The weight change, layers by roles](plot.png)",
        "import surgery  # the package adapter-surgery: it makes PEFT know the type",
        f"$ surgery convert {REPO} --to lora --base {BASE} -o small-lora",
    ):
        assert line in card.splitlines()
    assert "dW = diag(o) B diag(s) A" in card and "https://arxiv.org/abs/2604.21901" in card


def test_figures_of_another_file_are_left_out() -> None:
    """After training the file has another size, and what `surgery.json` says is no longer of it."""
    card = make_card(checked(provenance=CONVERTED, bytes=6896), REPO)
    assert "Measured" not in card and "| source" not in card and "| ratio" not in card


def test_what_a_training_did_is_told_in_place_of_what_a_conversion_lost() -> None:
    """The trained file may well have the size that the conversion wrote."""
    before = {"items": 512, "loss": 1.5, "score": "accuracy", "value": 0.5, "kl": None, "agreement": None}
    after = {**before, "loss": 0.25, "value": 0.75}
    trained = {**CONVERTED, "command": "train", "steps_done": 200, "before": before, "after": after}
    card = make_card(checked(config={"peft_type": "GIVA"}, provenance=trained), REPO)
    for line in (
        "Trained for 200 steps; evaluated on 512 items:",
        "| loss | 1.5000 | 0.2500 |",
        "| accuracy | 50.00% | 75.00% |",
        "| ratio | | 20.0 |",
    ):
        assert line in card.splitlines()
    assert "error of" not in card and "teacher" not in card
    taught = {**before, "score": None, "value": None, "loss": None, "kl": 0.5, "agreement": 0.9}
    card = make_card(checked(provenance={**trained, "before": taught, "after": {**taught, "kl": 4.7e-05}}), REPO)
    assert "| KL divergence from the teacher | 0.5 nats | 4.7e-05 nats |" in card and "| loss" not in card
    assert "evaluated" not in make_card(checked(provenance={**trained, "after": None}), REPO)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"use_dora": True}}, ["A DoRA adapter", "https://arxiv.org/abs/2402.09353"]),
        ({"config": {"peft_type": "IA3"}}, ["A (IA)³ adapter"]),
        ({"config": {"peft_type": "HRA"}}, ["A HRA adapter"]),
        ({"config": {"peft_type": "INILORA"}, "provenance": {"method": "inilora-beta"}}, ["A IniLoRA-beta adapter"]),
        ({"config": {"peft_type": "SMOA"}}, ["--to lora --base bases/llama --energy 0.99", "https://arxiv.org"]),
        ({"config": {"peft_type": "FROD_PORTABLE"}}, ["https://doi.org/10.1609/aaai.v40i31.39813"]),
        ({"revision": "v2"}, ['from_pretrained("bases/llama", revision="v2")', "at revision `v2`"]),
        ({"config": {"task_type": "SEQ_2_SEQ_LM"}}, ["AutoModelForSeq2SeqLM", "text2text-generation"]),
        ({"config": {"task_type": None}, "provenance": {"task": "image-cls"}}, ["AutoModelForImageClassification"]),
        (
            {"config": {"task_type": None, "auto_mapping": {"base_model_class": "BertModel", "parent_library":
                                                             "transformers.models.bert.modeling_bert"}}},
            ["from transformers import BertModel"],
        ),
        (
            {"config": {"task_type": "SEQ_CLS"}, "carried": {"classifier.dense.weight": (9, 9),
                                                             "classifier.out_proj.weight": (3, 9)}},
            ["num_labels=3, ignore_mismatched_sizes=True", "It brings `classifier.dense`, `classifier.out_proj`"],
        ),
        ({"config": {"peft_type": "PROMPT_TUNING"}, "modules": 0}, ["a learnt prompt"]),
    ],
)  # fmt: skip
def test_what_the_adapter_is(changes: dict[str, Any], words: list[str]) -> None:
    card = make_card(checked(**changes), REPO)
    assert all(word in card for word in words), card


OWN = """---
license: mit
# a comment of mine
tags: [sonnets]
---
# Sonnets

Trained on sonnets.
"""


def test_a_users_text_and_metadata_are_kept() -> None:
    card = make_card(checked(), REPO, existing=OWN)
    assert front(card)["license"] == "mit"
    assert front(card)["tags"] == ["sonnets", f"base_model:adapter:{BASE}", "lora", "transformers"]
    assert card.split("---\n", 2)[2].startswith("\n# Sonnets\n\nTrained on sonnets.\n\n" + BEGIN)
    assert own_text(card) == own_text(OWN) == "# Sonnets\n\nTrained on sonnets."


def test_the_place_of_the_base_model_becomes_its_id() -> None:
    """A trainer's card names the base by its folder."""
    text = "A fine-tuned version of [/data/llama](https://host//data/llama), not of data/llama.\n"
    card = make_card(checked(config={"base_model_name_or_path": "/data/llama/"}), REPO, existing=text)
    assert f"[{BASE}](https://host/{BASE}), not of data/llama." in card
    card = make_card(checked(config={"base_model_name_or_path": "llama"}), REPO, existing=text)
    assert text.strip() in card


def test_our_part_is_refreshed_where_it_stands() -> None:
    first = make_card(checked(), REPO, existing=OWN)
    moved = first.replace("Trained on sonnets.\n\n", "").rstrip() + "\n\nTrained on sonnets.\n"
    card = make_card(checked(modules=7), REPO, existing=moved)
    assert "7 layers changed" in card and "6 layers changed" not in card
    assert card.replace("7 layers", "6 layers") == moved
    assert make_card(checked(modules=7), REPO, existing=card) == card


def test_complete_metadata_is_kept_to_the_letter() -> None:
    card = make_card(checked(), REPO)
    commented = card.replace("library_name: peft\n", "library_name: peft  # as it is\n")
    assert make_card(checked(), REPO, existing=commented) == commented


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{BEGIN}\nold", "once each, or neither"),
        (f"{END}\n{BEGIN}", "once each, or neither"),
        (f"{BEGIN}{END}{BEGIN}{END}", "once each, or neither"),
        ("---\n- a\n---\n", "no YAML mapping"),
        ("---\na: [\n---\n", "is no YAML"),
    ],
)
def test_a_card_that_cannot_be_kept_is_refused(text: str, words: str) -> None:
    with pytest.raises(HubError, match=f"README.md: .*{words}"):
        make_card(checked(), REPO, existing=text)


def test_pefts_empty_template_is_nobodys_text(llama: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_base(llama), config)
    model.save_pretrained(tmp_path / "small")
    path = tmp_path / "small" / "README.md"
    template = path.read_text()
    assert str(llama) in template and len(template) > 4000
    card = make_card(checked(), REPO, existing=template)
    assert "More Information" not in card and str(llama) not in card
    assert own_text(template) == ""
    filled = template.replace("[More Information Needed]", "A LoRA for sonnets.", 1)
    assert "A LoRA for sonnets." in make_card(checked(), REPO, existing=filled)
    assert own_text(filled) != ""


def test_the_picture(llama: Path, tmp_path: Path) -> None:
    """Drawn where the file says what it changes; the same each time; one of the folder's own is taken first."""
    lora = make_adapter("lora", llama, tmp_path / "lora")
    plans = [surgery.push(lora, REPO, base_model=BASE, dry_run=True) for _ in range(2)]
    assert plans[0].files == plans[1].files
    assert [file.path for file in plans[0].files if file.path.endswith(".png")] == ["layers.png"]
    assert "](layers.png)" in plans[0].card
    (lora / "energy.svg").write_text("<svg/>")
    own = surgery.push(lora, REPO, base_model=BASE, dry_run=True)
    assert "](energy.svg)" in own.card and "layers.png" not in {file.path for file in own.files}
    for kind, folder in (("frod", tmp_path / "frod"), ("lora", tmp_path / "start")):
        made = make_adapter(kind, llama, folder)
        if kind == "lora":
            opened = surgery.Adapter.open(made)
            opened.tensors = {name: torch.zeros_like(tensor) for name, tensor in opened.tensors.items()}
            opened.save(made, force=True)
        assert ".png" not in surgery.push(made, REPO, base_model=BASE, dry_run=True).card
