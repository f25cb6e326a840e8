"""Conversations: what is learnt of them, and what is appended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgery.errors import DataError
from surgery.models.base_model import BaseModel
from surgery.passes.examples import read_examples
from tests.helpers.models import build
from tests.helpers.texts import END, save_tokenizer, write_rows

# `w10` opens a turn of the user, `w11` one of the assistant, <end> ends each; the words stand for themselves.
OPENS = {"user": 10, "assistant": 11}
TEMPLATE = (
    "{% for m in messages %}{{ 'w10 ' if m.role == 'user' else 'w11 ' }}{{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}w11 {% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.content }} {% endfor %}"
# As some models that think: what the assistant said before the last question is written shorter.
SHORTENING = (
    "{% for m in messages %}{{ 'w10 ' if m.role == 'user' else 'w11 ' }}"
    "{% if m.role == 'assistant' and not loop.last %}w60 {% else %}{{ m.content }} {% endif %}<end> {% endfor %}"
    "{% if add_generation_prompt %}w11 {% endif %}"
)
TURNS = [("user", "w5 w6"), ("assistant", "w7"), ("user", "w8"), ("assistant", "w9 w12")]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "model")
    return save_tokenizer(tmp_path / "model")


def read(place: Path, row: dict[str, Any], template: str | None = TEMPLATE, **options: Any) -> Any:
    """One row's sample under a template."""
    if template is not None:
        (place / "template.jinja").write_text(template)
        options["chat_template"] = place / "template.jinja"
    return read_examples(write_rows(place / "chat.jsonl", [row]), BaseModel.open(place / "model"), None, **options)


def expected(turns: list[tuple[str, str]], first: int = 0) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation under `TEMPLATE`, by hand."""
    ids: list[int] = []
    labels: list[int] = []
    for number, (role, content) in enumerate(turns):
        said = [int(word[1:]) for word in content.split()]
        ids += [OPENS[role], *said, END]
        learnt = role == "assistant" and number >= first
        labels += [-100, *(said if learnt else [-100] * len(said)), END if learnt else -100]
    return ids, labels


def test_the_assistants_turns_and_their_ends_are_learnt(llama: Path, tmp_path: Path) -> None:
    found = read(tmp_path, {"messages": messages(TURNS)})
    (row,) = found.features
    assert (row["input_ids"].tolist(), row["labels"].tolist()) == expected(TURNS)
    assert found.notes == [
        "1 conversations are written with the chat template, the loss is on the assistant's turns; nothing is appended"
    ]


@pytest.mark.parametrize("said", ["list", "text"])
def test_of_a_prompt_and_a_completion_the_completion_alone_is_learnt(said: str, llama: Path, tmp_path: Path) -> None:
    completion = messages(TURNS[3:]) if said == "list" else TURNS[3][1]
    found = read(tmp_path, {"prompt": messages(TURNS[:3]), "completion": completion})
    (row,) = found.features
    assert (row["input_ids"].tolist(), row["labels"].tolist()) == expected(TURNS, first=3)


def test_the_end_is_appended_where_the_template_has_none(llama: Path, tmp_path: Path) -> None:
    found = read(tmp_path, {"messages": messages(TURNS[:2])}, PLAIN)
    (row,) = found.features
    assert row["input_ids"].tolist() == [5, 6, 7, END] and row["labels"].tolist() == [-100, -100, 7, END]
    assert found.notes[0].endswith("the loss is on the assistant's turns; <end> is appended to 1 of them")


def test_turns_that_are_written_otherwise_later_are_not_learnt(llama: Path, tmp_path: Path) -> None:
    found = read(tmp_path, {"messages": messages(TURNS)}, SHORTENING)
    assert [label for label in found.features[0]["labels"].tolist() if label != -100] == [9, 12, END]
    assert found.notes[1].startswith("1 of the assistant's turns are written in another way")


def test_the_tokenizers_own_template_and_a_slow_tokenizer(llama: Path, tmp_path: Path, monkeypatch) -> None:
    save_tokenizer(llama, chat_template=TEMPLATE)
    found = read(tmp_path, {"messages": messages(TURNS)}, None)
    assert (found.features[0]["input_ids"].tolist(), found.features[0]["labels"].tolist()) == expected(TURNS)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    slow = read(tmp_path, {"messages": messages(TURNS)}, None)
    assert slow.features[0]["labels"].tolist() == found.features[0]["labels"].tolist()


def test_long_conversations_are_cut_and_said_to_be(llama: Path, tmp_path: Path) -> None:
    found = read(tmp_path, {"messages": messages(TURNS)}, max_length=7)
    assert found.features[0]["input_ids"].tolist() == expected(TURNS)[0][:7]
    assert found.notes[0] == "1 of 1 samples were cut at 7 tokens"


def test_plain_prompts_say_what_is_appended(llama: Path, tmp_path: Path) -> None:
    found = read(tmp_path, {"prompt": "w5", "completion": "w6"}, None)
    assert found.notes == ["<end> is appended to 1 completions, and is learnt"]


@pytest.mark.parametrize(
    ("row", "template", "words"),
    [
        ({"messages": messages(TURNS)}, None, "no chat template, which conversations need; give one with --chat-temp"),
        ({"messages": "hello"}, TEMPLATE, "sample 1: messages is 'hello', expected a list"),
        ({"messages": [{"content": "w5"}]}, TEMPLATE, "sample 1: messages is"),
        ({"messages": messages(TURNS)}, "{{ raise_exception('no system') }}", "cannot write the conversation"),
        ({"messages": messages(TURNS)}, "{% for %}", "cannot write the conversation"),
        ({"messages": messages(TURNS)}, " ", "the chat template is empty"),
        ({"messages": messages(TURNS[:1])}, TEMPLATE, "none of 1 samples has anything to learn from"),
    ],
)
def test_what_cannot_be_read_is_refused(row, template, words: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words.replace("(", r"\(")):
        read(tmp_path, row, template)


def test_a_task_without_texts_takes_no_template(model_folder, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    rows = write_rows(tmp_path / "a.jsonl", [{"prompt": "w5", "completion": "w6"}])
    base = BaseModel.open(model_folder("vit"))
    with pytest.raises(DataError, match=r"image processor|reads no conversations"):
        read_examples(rows, base, None, chat_template=tmp_path / "t.jinja")
