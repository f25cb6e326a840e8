"""The docs say what is true: generated parts are fresh, nothing is left out, links lead somewhere, code runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml
from click.shell_completion import get_completion_class

import surgery
from surgery.cli.main import COMMANDS, cli
from surgery.methods.registry import method_infos
from tests.helpers.docs_pages import DOCS, ROOT, Block, Page, anchors, blocks, example, make_workspace, pages, slug

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
BROKEN = {
    "an option that is not there": ("console", "$ surgery inspect model --colour\n"),
    "a command that is not there": ("console", "$ surgery reduce model\n"),
    "output that is not printed": ("console", "$ surgery inspect model\nwrites  a poem\n"),
    "a target that is not there": ("console", "$ make coffee\n"),
    "a script that is not there": ("console", "$ python examples/nothing.py\n"),
    "code that fails": ("python", "import surgery\nsurgery.init('model', 'nope')\n"),
    "code that is no code": ("python", "surgery.init(\n"),
    "a broken object": ("json", "{'command': }\n"),
    "an unknown language": ("ruby", "puts 1\n"),
}


def test_generated_parts_are_fresh() -> None:
    command = [sys.executable, str(DOCS / "generate.py"), "--check"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_command_option_method_and_call_is_documented() -> None:
    reference, library = (DOCS / "cli.md").read_text(), (DOCS / "api.md").read_text()
    readme, methods = PAGES["README.md"].read_text(), (DOCS / "methods" / "index.md").read_text()
    for name in COMMANDS:
        assert f"## surgery {name}\n" in reference and f"surgery {name}" in readme
        command = cli.get_command(click.Context(cli), name)
        assert command is not None and command.help and "Example" in command.help
        for option in (each for each in command.params if isinstance(each, click.Option)):
            assert option.help and option.opts[-1] in reference, f"surgery {name} {option.name}"
    for info in method_infos():
        page = (DOCS / "methods" / f"{info.module.rpartition('.')[2]}.md").read_text()
        assert f"`{info.name}`" in methods and f"`{info.name}`" in page and info.paper in page
    calls = {name for name in surgery.__all__ if not name.startswith("__")} - set(surgery.errors.__all__)
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", library, re.MULTILINE)}
    assert calls <= documented, calls - documented


def test_help_fits_80_columns() -> None:
    reference = (DOCS / "cli.md").read_text()
    helps = [block.text for block in blocks(reference) if block.text.startswith("Usage: ")]
    assert len(helps) == len(COMMANDS) + 1
    assert not [line for text in helps for line in text.splitlines() if len(line) > 80]
    assert "..." not in helps[0].partition("Commands:")[2]  # a sentence that is cut short


def test_api_page_names_what_is_there() -> None:
    for path in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE):
        module, _, name = path.rpartition(".")
        code = f"import {module} as m; assert m.{name}.__doc__" if module != "surgery" else f"import surgery.{name}"
        exec(code, {})


@pytest.mark.parametrize("name", PAGES)
def test_local_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#?)([^)]*)\)", page.read_text()):
        linked = (page.parent / target) if target else page
        assert linked.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{name}: {target}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    hooks = example("../docs/hooks")

    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for each in (entry.values() if isinstance(entry, dict) else entry) for name in files(each)]

    listed = set(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert there <= listed and listed - there <= hooks.MEASURED
    config = SimpleNamespace(
        docs_dir=str(DOCS), nav=[{"A": [{"R": "results.md"}, {"S": "scale.md"}]}, "index.md", "no.md"]
    )
    left = set(files(hooks.on_config(config).nav))
    assert left == {"index.md", "no.md"} | ({"results.md", "scale.md"} & there)


def test_errors_page_quotes_messages_of_the_program() -> None:
    sources = [path.read_text() for folder in ("surgery", "converters") for path in (ROOT / folder).rglob("*.py")]
    # Texts that are written in several parts, one after another, are one message.
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    quoted = re.findall(r"^### `(.+)`$", (DOCS / "faq.md").read_text(), re.MULTILINE)
    assert len(quoted) > 15
    for message in quoted:
        if not message.startswith("KeyError"):
            for part in re.split("…", message):
                assert part.strip(" ();:") in joined, message


# Code


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every page gets a copy of."""
    folder = tmp_path_factory.mktemp("workspace")
    make_workspace(folder)
    return folder


@pytest.fixture
def here(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder."""
    place = tmp_path / "page"
    shutil.copytree(workspace, place, ignore=shutil.ignore_patterns("model"))
    (place / "model").symlink_to(workspace / "model")
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if any(blocks(page.read_text()))])
def test_code_runs(name: str, here: Path) -> None:
    page = Page()
    for block in blocks(PAGES[name].read_text()):
        try:
            page.run(block)
        except Exception as error:
            raise AssertionError(f"{name}, line {block.line}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("name", BROKEN)
def test_code_that_is_wrong_is_noticed(name: str, here: Path) -> None:
    language, text = BROKEN[name]
    with pytest.raises((AssertionError, SyntaxError, ValueError, surgery.errors.SurgeryError)):
        Page().run(Block(1, language, text, None))


def test_marked_blocks_are_checked() -> None:
    marked = "<!-- not run: no Hub here -->\n```console\n$ surgery push small/ ada/small --privat\n```\n"
    (block,) = blocks(marked)
    assert block.why == "no Hub here"
    with pytest.raises(AssertionError, match="--privat"):
        Page().run(block)
    (kept,) = blocks(marked.replace("privat", "private"))
    Page().run(kept)


def test_fences_that_would_be_passed_over_are_noticed() -> None:
    with pytest.raises(AssertionError):
        list(blocks("  ```python\n  1 / 0\n  ```\n"))


def test_slugs() -> None:
    assert slug("The life of `surgery init`") == "the-life-of-surgery-init"
    assert slug("IniLoRA, -alpha, -beta") == "inilora-alpha-beta"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str) -> None:
    kind = get_completion_class(shell)
    assert kind is not None
    completion = kind(cli, {}, "surgery", "_SURGERY_COMPLETE")
    assert {item.value for item in completion.get_completions([], "in")} == {"init", "inspect"}
    assert [item.value for item in completion.get_completions(["init"], "--me")] == ["--method"]
    assert "frod" in {item.value for item in completion.get_completions(["init", "--method"], "")}


def test_the_program_answers_a_completing_shell() -> None:
    words = {"_SURGERY_COMPLETE": "bash_complete", "COMP_WORDS": "surgery in", "COMP_CWORD": "1"}
    program = str(Path(sys.executable).with_name("surgery"))
    result = subprocess.run([program], check=False, capture_output=True, text=True, env={**os.environ, **words})
    assert "init" in result.stdout and not result.stderr
