"""Tokenizers, templates and processors beside an adapter go where it goes; the adapter's replace the base's."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import transformers as tf
from peft import get_peft_model

import surgery
from surgery.adapters.companions import companion_files, replaced_by
from surgery.errors import AdapterError
from tests.helpers.models import load_base, save_model
from tests.helpers.stock_adapters import randomise
from tests.helpers.texts import save_tokenizer

TEMPLATE = "<tool>{{ messages[0].content }}"
OTHERS = ["preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json"]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base with its tokenizer, and an adapter with one that knows a word more, a template and processor files."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    save_model("llama", base)
    save_tokenizer(base)
    model = get_peft_model(load_base(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model)
    model.save_pretrained(lora)
    save_tokenizer(lora)
    tokenizer = tf.AutoTokenizer.from_pretrained(lora)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(lora)
    for name in OTHERS:
        (lora / name).write_text(json.dumps({"of": "the adapter"}))
    (lora / "additional_chat_templates").mkdir()
    (lora / "additional_chat_templates" / "tool.jinja").write_text(TEMPLATE)
    return base, lora


def _check(folder: Path, lora: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("<tool>").input_ids == tf.AutoTokenizer.from_pretrained(lora)("<tool>").input_ids
    template = tokenizer.chat_template
    assert (template["default"] if isinstance(template, dict) else template) == TEMPLATE
    for name in [*OTHERS, "additional_chat_templates/tool.jinja"]:
        assert (folder / name).read_bytes() == (lora / name).read_bytes()


def test_a_merged_folder_has_the_adapters(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = pair
    (base / "added_tokens.json").write_text('{"<other>": 60}')
    report = surgery.merge(lora, base, tmp_path / "merged")
    _check(tmp_path / "merged", lora)
    assert not (tmp_path / "merged" / "added_tokens.json").exists()  # a third tokenizer otherwise
    assert any("in place of the base's" in note for note in report.notes)


@pytest.mark.parametrize("to", ["lora", "giva"])
def test_a_converted_folder_has_them(pair: tuple[Path, Path], tmp_path: Path, to: str) -> None:
    _, lora = pair
    surgery.convert(lora, to=to, energy=1.0, out=tmp_path / "out")
    _check(tmp_path / "out", lora)


def test_a_push_sends_them(pair: tuple[Path, Path]) -> None:
    _, lora = pair
    sent = {file.path for file in surgery.push(lora, "a/b", base_model="o/b", dry_run=True).files}
    assert {*OTHERS, "additional_chat_templates/tool.jinja", "chat_template.jinja", "tokenizer.json"} <= sent


def test_a_part_of_a_tokenizer_replaces_that_part_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    companions = companion_files(tmp_path)
    assert replaced_by(companions, ["tokenizer.json", "tokenizer_config.json"]) == ["tokenizer_config.json"]


def test_a_template_inside_a_tokenizer_replaces_the_bases_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (tmp_path / "vocab.txt").write_text("a")
    names = ["chat_template.jinja", "added_tokens.json", "preprocessor_config.json"]
    assert replaced_by(companion_files(tmp_path), names) == names[:2]


def test_a_link_that_leads_out_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, lora = pair
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (lora / "vocab.txt").symlink_to(secret)
    with pytest.raises(AdapterError, match="leads out of its folder"):
        surgery.inspect(lora)
