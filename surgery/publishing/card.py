"""The model card of a published adapter.

Our part of the text sits between two markers and is written anew by every push; the rest is the user's and stays.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from surgery.adapters.types.registry import type_of
from surgery.errors import HubError
from surgery.methods.catalogue import MethodInfo
from surgery.methods.registry import METHODS, info_for_config
from surgery.models.tasks import TASK_TABLE
from surgery.publishing.checks import Checked
from surgery.publishing.private import without_paths
from surgery.system.text import human_bytes

__all__ = ["BEGIN", "END", "make_card", "method_of", "own_text"]

BEGIN, END = "<!-- surgery: begin -->", "<!-- surgery: end -->"
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?\n?", re.DOTALL | re.MULTILINE)
UNFILLED = "[More Information Needed]"
# Task -> transformers' automatic class, and the Hub's name for what the model is used for.
CLASSES = {
    "causal-lm": ("AutoModelForCausalLM", "text-generation"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "seq-cls": ("AutoModelForSequenceClassification", "text-classification"),
    "token-cls": ("AutoModelForTokenClassification", "token-classification"),
    "question-answering": ("AutoModelForQuestionAnswering", "question-answering"),
    "masked-lm": ("AutoModelForMaskedLM", "fill-mask"),
    "image-cls": ("AutoModelForImageClassification", "image-classification"),
    "feature-extraction": ("AutoModel", "feature-extraction"),
}
# PEFT's own types: title and paper.


def make_card(
    checked: Checked,
    repo: str,
    revision: str | None = None,
    license: str | None = None,
    picture: str | None = None,
    existing: str | None = None,
) -> str:
    """The text of `README.md`.

    Args:
        checked: the adapter.
        repo: the Hub id it will have.
        revision: the branch it is pushed to, or None for the main one.
        license: the Hub's name of the licence.
        picture: name of a picture in the repository.
        existing: a card to keep: its metadata, and its text outside the markers.

    Raises:
        HubError: the existing card has metadata that is no YAML mapping, or one marker without the other.
    """
    existing = _with_base_id(existing or "", checked)
    head, text = _split(existing)
    merged = _merged(head, checked, license)
    block = f"{BEGIN}\n{_block(checked, repo, revision, picture)}\n{END}"
    matter = FRONT_MATTER.match(existing)
    kept = matter is not None and merged == head
    front = matter[0] if matter is not None and kept else f"---\n{_dumped(merged)}---\n"
    return f"{front}\n{_with_block(text, block, repo).strip()}\n"


def own_text(card: str | None) -> str:
    """What in a card somebody wrote: outside our markers, and not PEFT's template left as it was."""
    _, text = _split(card or "")
    start, end = _markers(text)
    outside = text if start is None or end is None else text[:start] + text[end:]
    return "" if _is_template(outside) else outside.strip()


def method_of(checked: Checked) -> tuple[str, str | None, str | None]:
    """Title, paper and formula of an adapter's method."""
    info = _info(checked)
    if info is not None:
        return info.title, info.paper, info.change
    kind = type_of(checked.config)
    return (kind.title, kind.paper, kind.change) if kind is not None else (checked.peft_type, None, None)


def _info(checked: Checked) -> MethodInfo | None:
    named = METHODS.get(str(checked.provenance.get("method")))
    if named is not None and named.peft_type == checked.peft_type:
        return named.of_variant(checked.config.get("variant") or named.unnamed_variant)
    return info_for_config(checked.config)


# Metadata


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata, and its text."""
    matter = FRONT_MATTER.match(card)
    if matter is None:
        return {}, card
    try:
        head = yaml.safe_load(matter[1]) or {}
    except yaml.YAMLError as error:
        raise HubError(f"README.md: its metadata is no YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(head, dict):
        raise HubError("README.md: its metadata is no YAML mapping")
    return head, card[matter.end() :]


def _merged(head: dict[str, Any], checked: Checked, license: str | None) -> dict[str, Any]:
    """The metadata of a card with ours: what says which adapter this is is set, the rest only where it is missing."""
    tags = head.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    ours = [f"base_model:adapter:{checked.base}", method_of(checked)[0].lower(), "transformers"]
    # PEFT names the base by its place on the disk, in a tag too.
    kept = [str(tag) for tag in tags if str(tag) in ours or not str(tag).startswith("base_model:")]
    merged = {**without_paths(head), "base_model": checked.base, "base_model_relation": "adapter"}
    merged["library_name"] = "peft"
    if license is not None:
        merged["license"] = license
    task = _task(checked)
    if task is not None:
        merged.setdefault("pipeline_tag", CLASSES[task][1])
    merged["tags"] = list(dict.fromkeys([*kept, *ours]))
    return merged


def _dumped(head: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return text


def _task(checked: Checked) -> str | None:
    by_type = {peft_type: name for name, (peft_type, _) in TASK_TABLE.items() if peft_type}
    task = by_type.get(str(checked.config.get("task_type"))) or checked.provenance.get("task")
    return task if task in CLASSES else None


# Text


def _with_base_id(card: str, checked: Checked) -> str:
    """A card with the base model's Hub id wherever a trainer has written its place on the disk."""
    named = str(checked.config.get("base_model_name_or_path") or "").rstrip("/")
    return card.replace(named, checked.base) if len(Path(named).parts) > 2 and Path(named).is_absolute() else card


def _markers(text: str) -> tuple[int | None, int | None]:
    """Where our part starts and ends."""
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 and end < 0:
        return None, None
    if not 0 <= start < end or text.count(BEGIN) > 1 or text.count(END) > 1:
        raise HubError(f"README.md: needs {BEGIN} and, after it, {END}, once each, or neither")
    return start, end + len(END)


def _with_block(text: str, block: str, repo: str) -> str:
    start, end = _markers(text)
    if start is not None and end is not None:
        return text[:start] + block + text[end:]
    if not text.strip() or _is_template(text):
        return f"# {repo.partition('/')[2]}\n\n{block}"
    return f"{text.strip()}\n\n{block}"


def _is_template(text: str) -> bool:
    """Whether a text is the card that PEFT writes into every folder, with nothing filled in."""
    if text.count(UNFILLED) < 20:
        return False
    versions = re.compile(r"### Framework versions|- PEFT [\w.+]+|\s*")
    return all(line in _template() or versions.fullmatch(line) for line in text.splitlines())


@functools.cache
def _template() -> frozenset[str]:
    from huggingface_hub import ModelCard, ModelCardData

    return frozenset(ModelCard.from_template(ModelCardData()).text.splitlines())


def _block(checked: Checked, repo: str, revision: str | None, picture: str | None) -> str:
    parts = [_what(checked), _sizes(checked), _losses(checked), _training(checked)]
    if picture is not None:
        parts.append(f"![The weight change, layers by roles]({picture})")
    parts += [_loading(checked, repo, revision), _plain_lora(checked, repo, revision)]
    return "\n\n".join(part for part in parts if part)


def _what(checked: Checked) -> str:
    title, paper, change = method_of(checked)
    where = f"`{checked.base}`" + (f" at revision `{checked.revision}`" if checked.revision else "")
    changed = f"{checked.modules:,} layers changed" if checked.modules else "a learnt prompt"
    lines = [f"A {title} adapter for {where}: PEFT type `{checked.peft_type}`, {changed}."]
    lines += [f"Each weight W becomes W + dW with `dW = {change}`."] if change else []
    kind = type_of(checked.config)
    gains = kind.gains(checked.config) if kind is not None else {}
    if gains:
        lines.append(
            f"{len(gains):,} of them also have gains on W, `diag(1 + g) W - W` or `W diag(1 + g) - W`: on "
            f"{', '.join(sorted(set(gains.values())))}."
        )
    lines += [f"{title}: {_cited(paper)}."] if paper else []
    heads = sorted({name.rpartition(".")[0] for name in checked.carried} - {""})
    lines += [f"It brings {', '.join(f'`{head}`' for head in heads[:4])} whole."] if heads else []
    return "\n".join(lines)


def _cited(paper: str) -> str:
    kind, _, number = paper.partition(" ")
    places = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
    return f"[{paper}]({places[kind]}{number})" if kind in places else paper


def _sizes(checked: Checked) -> str:
    rows = [("this file", checked.peft_type, checked.bytes)]
    source = checked.provenance.get("source")
    known = _is_fresh(checked) or checked.provenance.get("command") == "train"
    if isinstance(source, dict) and isinstance(source.get("bytes"), int) and known:
        rows.insert(0, ("source", str(source.get("peft_type")), source["bytes"]))
    lines = ["| | type | size |", "|---|---|---|"]
    lines += [f"| {name} | {kind} | {human_bytes(size)} ({size:,} bytes) |" for name, kind, size in rows]
    if len(rows) > 1:
        lines.append(f"| ratio | | {rows[0][2] / max(checked.bytes, 1):.1f} |")
    return "\n".join(lines)


def _is_fresh(checked: Checked) -> bool:
    """Whether the losses in `surgery.json` are this file's: they are not once it was trained, by us or by others."""
    report = checked.provenance.get("report")
    if checked.provenance.get("command") != "convert":
        return False
    return isinstance(report, dict) and report.get("bytes") == checked.bytes


def _losses(checked: Checked) -> str:
    report = checked.provenance.get("report")
    if not isinstance(report, dict) or not _is_fresh(checked):
        return ""
    measures = [
        ("error of the weight change", "weight_error", "{:.2%}"),
        ("error of the layers' outputs", "output_error", "{:.2%}"),
        ("KL divergence of the predictions", "kl", "{:.3g} nats"),
        ("predictions that agree", "agreement", "{:.2%}"),
    ]
    rows = [(name, shown.format(report[key])) for name, key, shown in measures if _is_number(report.get(key))]
    if not rows:
        return ""
    data = checked.provenance.get("data")
    on = f", on `{without_paths(data)}`" if data and any(key in report for key in ("output_error", "kl")) else ""
    lines = [f"Measured against the source{on}:", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])


def _training(checked: Checked) -> str:
    """What our own training has done, as it evaluated itself."""
    before, after = (checked.provenance.get(name) for name in ("before", "after"))
    if checked.provenance.get("command") != "train" or not isinstance(before, dict) or not isinstance(after, dict):
        return ""
    score = str(after.get("score"))
    measures = [
        ("loss", "loss", "{:.4f}"),
        (score, "value", "{:.2%}" if score == "accuracy" else "{:.4g}"),
        ("KL divergence from the teacher", "kl", "{:.3g} nats"),
        ("predictions that agree with the teacher's", "agreement", "{:.2%}"),
    ]
    rows = [
        f"| {name} | {shown.format(before[key])} | {shown.format(after[key])} |"
        for name, key, shown in measures
        if _is_number(before.get(key)) and _is_number(after.get(key))
    ]
    steps = checked.provenance.get("steps_done")
    lines = [f"Trained for {steps} steps; evaluated on {after.get('items')} items:", "", "| | before | after |"]
    return "\n".join([*lines, "|---|---|---|", *rows]) if rows else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _loading(checked: Checked, repo: str, revision: str | None) -> str:
    name, options = _base_class(checked)
    at = f", revision={json.dumps(checked.revision)}" if checked.revision else ""
    mine = f", revision={json.dumps(revision)}" if revision else ""
    lines = ["```python"]
    kind = type_of(checked.config)
    if kind is not None and kind.imported_by == "surgery":
        lines.append("import surgery  # the package adapter-surgery: it makes PEFT know the type")
    elif kind is not None and kind.imported_by is not None:
        lines.append(f"import {kind.imported_by}  # it makes PEFT know the type")
    lines += [
        "from peft import PeftModel",
        f"from transformers import {name}",
        "",
        f"base = {name}.from_pretrained({json.dumps(checked.base)}{at}{options})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(repo)}{mine})",
        "```",
    ]
    return "## Use it\n\n" + "\n".join(lines)


def _base_class(checked: Checked) -> tuple[str, str]:
    """The transformers class of the base model, and further arguments: the labels of a head that the adapter brings."""
    task, mapping = _task(checked), checked.config.get("auto_mapping") or {}
    known = mapping.get("base_model_class")
    if task is None and known and str(mapping.get("parent_library", "")).startswith("transformers."):
        return str(known), _labels(checked)
    name = CLASSES[task][0] if task is not None else "AutoModel"
    return name, _labels(checked) if task in {None, "seq-cls", "token-cls", "image-cls"} else ""


def _labels(checked: Checked) -> str:
    heads = [
        shape[0]
        for name, shape in sorted(checked.carried.items())
        if len(shape) == 2 and re.search(r"(^|\.)(classifier|score)\b", name)
    ]
    # A base whose own head has another number of labels would not load; the adapter replaces that head anyway.
    return f", num_labels={heads[-1]}, ignore_mismatched_sizes=True" if heads else ""


def _plain_lora(checked: Checked, repo: str, revision: str | None) -> str:
    kind = type_of(checked.config)
    if kind is None or not kind.readable or kind.title == "LoRA":
        return ""
    named = f"{repo}@{revision}" if revision else repo
    base = f"{checked.base}@{checked.revision}" if checked.revision else checked.base
    full = not kind.thin or bool(kind.gains(checked.config))
    what = "A plain LoRA, for stock PEFT and for servers" + (", with 99 % of every layer's energy:" if full else ":")
    out = f"{repo.partition('/')[2]}-lora"
    command = f"surgery convert {named} --to lora --base {base}{' --energy 0.99' if full else ''} -o {out}"
    return f"{what}\n\n```console\n$ {command}\n```"
