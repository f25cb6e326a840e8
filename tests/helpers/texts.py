"""Tokenizers, data files and real text, made when the tests run."""

from __future__ import annotations

import ast
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers.models import VOCAB

PAD, UNK, END, MASK, FIRST = 0, 1, 2, 3, 4
SPECIAL = {"<pad>": PAD, "<unk>": UNK, "<end>": END, "<mask>": MASK}
PACKAGES = ("accelerate", "click", "datasets", "numpy", "peft", "scipy", "torch", "transformers")


def save_tokenizer(folder: Path, ends_texts: bool = False, without: Sequence[str] = (), **settings: Any) -> Path:
    """Save a tokenizer of the words `w4` to `w60`, whose ids are their numbers.

    Args:
        folder: where a tiny model is.
        ends_texts: put the end token after every text, and between the two of a pair, as BERT does.
        without: special tokens that it lacks: pad, eos, mask.
        settings: of `PreTrainedTokenizerFast`.
    """
    words = {**SPECIAL, **{f"w{number}": number for number in range(FIRST, VOCAB)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if ends_texts:
        pair = "$A <end> $B:1 <end>:1"
        tokenizer.post_processor = TemplateProcessing(single="$A <end>", pair=pair, special_tokens=[("<end>", END)])
    special = {"pad": "<pad>", "eos": "<end>", "mask": "<mask>", "unk": "<unk>"}
    chosen = {f"{name}_token": token for name, token in special.items() if name not in without}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **chosen, **settings).save_pretrained(folder)
    return folder


def words(count: int, generator: random.Random) -> str:
    """A text of so many words."""
    return " ".join(f"w{generator.randrange(FIRST, VOCAB)}" for _ in range(count))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A `.jsonl` file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_rows(count: int, labels: int = 0, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[dict[str, Any]]:
    """Rows of texts of unequal length, with labels if wanted; every label occurs."""
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = [
        {"text": words(generator.randint(shortest, longest), generator)} for _ in range(count)
    ]
    for index, row in enumerate(rows):
        if labels:
            row["label"] = index % labels
    return rows


def docstring_rows(each: int) -> list[dict[str, Any]]:
    """Docstrings of installed packages, `label` the package: real text for a task of eight classes."""
    found: list[dict[str, Any]] = []
    for label, package in enumerate(PACKAGES):
        found += [{"text": text, "label": label} for text in itertools.islice(_docstrings(package), each)]
    return found


def _docstrings(package: str) -> Iterator[str]:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("*.py")):
        if path.stat().st_size > 200_000:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= 80:
                    yield text[:400]
