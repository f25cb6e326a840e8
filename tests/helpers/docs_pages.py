"""Pages of the docs, their blocks of code, and a folder in which these run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
import transformers
import yaml

from surgery.cli.main import cli
from tests.helpers.command_line import invoke
from tests.helpers.models import minilm_folder

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+?) -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
# Languages of blocks that hold nothing to run.
PLAIN = {"text", "json", "yaml", "toml"}
INCLUDE = '--8<-- "'


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: where it starts in its page.
        language: as the fence says.
        text: what it holds.
        why: why it is not run; None for one that is.
    """

    line: int
    language: str
    text: str
    why: str | None


def pages() -> list[Path]:
    """README and every page of the docs."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page, from first to last.

    Raises:
        AssertionError: a fence is not closed, or is written so that it would be passed over.
    """
    found = list(BLOCK.finditer(text))
    assert 2 * len(found) == len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)), "a fence that is not understood"
    for match in found:
        yield Block(text.count("\n", 0, match.start()) + 1, match["language"], match["text"], match["why"])


def example(name: str) -> ModuleType:
    """A script of `examples/` as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_workspace(folder: Path) -> None:
    """What the docs take for granted: `model`, `train.jsonl`, `test.jsonl`, `texts.jsonl`, `lora` and, of it, `small`.

    As `examples/sample.py` makes them, but for a model that is small and a training that is short.
    """
    sample = example("sample")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, num_labels=4
    )
    transformers.BertModel(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (minilm_folder() / name).exists():
            (folder / "model" / name).write_bytes((minilm_folder() / name).read_bytes())
    rows = sample.write_data(folder, each=30, length=90)
    here = Path.cwd()
    os.chdir(folder)
    try:
        sample.train_lora("model", rows, Path("lora"), steps=3)
        run_command("surgery convert lora --to giva --ratio 5 -o small")
    finally:
        os.chdir(here)


class Page:
    """Runs the blocks of one page, one after another, in the current folder."""

    def __init__(self) -> None:
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, block: Block) -> None:
        """Run a block, or check of one that is marked whatever can be checked without running it.

        Raises:
            AssertionError: it does not do what the page says.
        """
        if INCLUDE in block.text:
            assert (ROOT / block.text.split('"')[1]).is_file(), block.text
        elif block.language in PLAIN:
            _check_plain(block)
        elif block.language == "python":
            self._python(block)
        elif block.language == "bash":  # commands that take long: checked, not run
            for line in filter(str.strip, block.text.replace("\\\n", " ").splitlines()):
                check_command(line)
        else:
            assert block.language == "console", f"line {block.line}: what is a block of {block.language!r}?"
            for command, output in console(block.text):
                if block.why is not None:
                    check_command(command)
                else:
                    _check_output(command, output, run_command(command))

    def _python(self, block: Block) -> None:
        code = compile(block.text, f"<line {block.line}>", "exec")
        if block.why is None:
            exec(code, self._names)


def console(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the output that the page shows."""
    lines = text.replace("\\\n", " ").splitlines()
    assert lines and lines[0].startswith("$ "), f"a console block starts with a command: {text}"
    command, output = lines[0], []
    for line in lines[1:]:
        if line.startswith("$ "):
            yield command[2:], output
            command, output = line, []
        else:
            output.append(line)
    yield command[2:], output


def run_command(command: str) -> str:
    """Run a `surgery` command, and give what it prints; check any other command that a page may show."""
    words = shlex.split(command, comments=True)
    if words[0] != "surgery":
        check_command(command)
        return ""
    result = invoke(*words[1:])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.output


def check_command(command: str) -> None:
    """What can be known of a command without running it: that its options, targets, scripts and extras are there."""
    words = shlex.split(command, comments=True)
    if "surgery" in words and "_SURGERY_COMPLETE" not in command:
        arguments = words[words.index("surgery") + 1 :]
        root = cli.make_context(
            "surgery", arguments[:1] if arguments[0].startswith("-") else [], resilient_parsing=True
        )
        if not arguments[0].startswith("-"):
            named = cli.get_command(root, arguments[0])
            assert named is not None, f"{command}: no such command"
            try:
                named.make_context(arguments[0], arguments[1:], parent=root)
            except click.UsageError as error:
                raise AssertionError(f"{command}: {error.format_message()}") from None
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{command}: no such target"
    elif Path(words[0]).name.startswith("python") and words[1].endswith(".py"):
        script = ROOT / words[1]
        assert script.is_file(), f"{command}: no such script"
        sources = script.read_text() + (ROOT / "benchmarks" / "bench.py").read_text()
        missing = [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in sources]
        assert not missing, f"{command}: {missing}"
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name in re.findall(r"\[(\w+)\]", command):
            assert name in extras, f"{command}: no extra {name}"


def _check_plain(block: Block) -> None:
    readers = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}
    if block.language in readers:
        readers[block.language](block.text)


def _check_output(command: str, shown: list[str], printed: str) -> None:
    """Every line that the page shows starts as one that was printed, numbers apart."""
    labels = {_label(line) for line in printed.splitlines()}
    missing = [line for line in shown if line.strip() not in {"", "..."} and _label(line) not in labels]
    assert not missing, f"{command}: shows {missing}, printed\n{printed}"


def _label(line: str) -> str:
    return re.sub(r"[\d.,]+", "#", re.split(r"\s{2,}", line.strip())[0])


def slug(heading: str) -> str:
    """The anchor of a heading."""
    plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
