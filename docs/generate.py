"""Write the parts of the docs that come from the code: the command-line reference, tables, and the drawing of packages.

python docs/generate.py           writes what stands between the markers in docs/cli.md and docs/methods/
python docs/generate.py --check   exits with 1 where that is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' reading of the imports

from docs.drawing import drawing
from surgery.adapters.format_registry import FORMATS
from surgery.adapters.types.base import AdapterType, Needs
from surgery.adapters.types.no_change import NO_CHANGE
from surgery.adapters.types.registry import all_types
from surgery.cli.init import FLAGS
from surgery.cli.main import cli
from surgery.converters.forms import FORMS
from surgery.formats.server import ServerFormat
from surgery.methods.catalogue import MethodInfo
from surgery.methods.registry import METHODS
from surgery.models.sites import CONVOLUTION, EMBEDDING, EXPERT

DOCS = Path(__file__).parent
BEGIN, END = "<!-- generated: {} -->", "<!-- end -->"
# Of `surgery init`, for every method.
SHARED = "`--target-modules`, `--task`, `--device`, `--dtype`, `--seed` and the rest are those of every method"


def command_reference() -> str:
    """`--help` of the program and of every command, at 80 columns."""
    root = cli.make_context("surgery", [], resilient_parsing=True, terminal_width=80)
    parts = [f"## surgery\n\n```text\n{cli.get_help(root)}\n```\n"]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = command.make_context(name, [], parent=root, resilient_parsing=True, terminal_width=80)
        parts.append(f"## surgery {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts).rstrip()


def rows(header: list[str], cells: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells])


def our_methods() -> list[MethodInfo]:
    """Return the methods of this package, whichever plugins are installed."""
    return [info for info in METHODS if not METHODS.is_plugin(info.name)]


def page_of(info: MethodInfo) -> str:
    """Return the name of a method's page in docs/methods."""
    return f"{info.module.rpartition('.')[2]}.md"


def method_table() -> str:
    """The methods with their defaults."""
    found = {info: _facts(info) for info in our_methods()}
    header = ["method", *next(iter(found.values()))]
    return rows(header, [[f"[`{info.name}`]({page_of(info)})", *facts.values()] for info, facts in found.items()])


def _facts(info: MethodInfo) -> dict[str, str]:
    return {
        "dW": f"`{info.change}`",
        "trains": info.trains,
        "stored besides": info.stores,
        "PEFT type": f"`{info.peft_type}`",
        "default rank": str(info.rank) if info.rank else "-",
        "default alpha": "the rank" if "alpha" in info.options else "-",
        "learning rate": f"{info.training_rate:g}",
        "paper": info.paper,
    }


def fact_table(infos: list[MethodInfo]) -> str:
    """The facts of the methods that share a page, side by side; what they share in one cell is not repeated."""
    columns = [_facts(info) for info in infos]
    return rows(
        ["", *(f"`{info.name}`" for info in infos)],
        [[name, *(column[name] for column in columns)] for name in columns[0]],
    )


def option_table(infos: list[MethodInfo]) -> str:
    """The options of `surgery init` that the methods of a page take, with their help."""
    command = cli.get_command(click.Context(cli), "init")
    assert command is not None
    taken = set().union(*(info.options for info in infos))
    cells = [
        [f"`{FLAGS[str(parameter.name)]}`", _own_help(" ".join(str(parameter.help).split()), infos)]
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name in taken
    ]
    return f"{rows(['option', ''], cells)}\n\n{SHARED} ([command line](../cli.md#surgery-init))."


def _own_help(text: str, infos: list[MethodInfo]) -> str:
    """Of help that speaks of several methods, each after its name and a colon, the part for the methods of a page."""
    parts = re.split(rf"(?:^| )(?=(?:{'|'.join(METHODS.names())}): )", text)
    own = [part for part in parts if part.partition(":")[0] in {info.name for info in infos}]
    return own[0] if own else text


def form_table() -> str:
    """The forms of `surgery convert`, with what each holds, its default and its options."""
    cells = []
    for form in FORMS:
        default = " ".join(f"`--{name} {value:g}`" for name, value in form.default_budget.items()) or "all is kept"
        budgets = ", ".join(f"`--{name.replace('_', '-')}`" for name in form.budgets)
        options = ", ".join(f"`{option.flag}`" for option in form.options) or "-"
        cells.append([f"`{form.name}`", form.title, form.holds, default, budgets, options])
    return rows(["form", "", "holds exactly", "without a budget", "budgets", "own options"], cells)


# What a verb does with a type, by what the type needs of the base and whether its changes have thin factors.
VERBS = ("inspect", "convert --to giva", "convert --to lora", "merge", "compare", "load", "push")


def verb_cells(kind: AdapterType) -> dict[str, str]:
    """Verb -> what it does with an adapter of a type."""
    based = " with `--base`" if kind.needs({}) else ""
    needs_base = f"yes,{based}" if based else "yes"
    return {
        "inspect": f"norms{based}" if based else "yes",
        "convert --to giva": f"exact as gains{based}" if kind.as_gains else f"exact{based}",
        "convert --to lora": f"exact{based}" if kind.thin else f"cut to a rank{based}",
        "merge": "yes",
        "compare": needs_base,
        "load": "yes, after `import surgery`" if kind.imported_by else "yes",
        "push": "yes",
    }


def type_table() -> str:
    """The adapter types that are read: their layers, their change, and what each verb does with them."""
    needs = {Needs.NOTHING: "nothing", Needs.SHAPE: "its shape", Needs.VALUES: "its values"}
    cells = []
    for kind in all_types():
        if kind.readable:
            change = f"`{kind.change}`" if kind.change else "by PEFT's own merge of one layer"
            about = [f"`{kind.peft_type}`", kind.title, change, ", ".join(kind.layers), needs[kind.needs({})]]
            cells.append([*about, *verb_cells(kind).values()])
    refused = [[f"`{kind.peft_type}`", kind.reason] for kind in NO_CHANGE.values()]
    header = ["type", "", "dW", "layers", "needs of the base weight", *(f"`{verb}`" for verb in VERBS)]
    return f"{rows(header, cells)}\n\nRefused by what they are:\n\n{rows(['type', 'reason'], refused)}"


def server_cell(kind: AdapterType) -> str:
    """What `surgery export` makes of an adapter of a type, for every target: all take a plain LoRA of one rank."""
    based = ", with `--base`" if kind.needs({}) else ""
    if kind.thin:
        return f"exact{based}"
    if not kind.needs({}):  # products of factors, which are factors themselves while their ranks multiply to few
        return "exact while its factors are thin, else cut"
    return f"cut{based}"


def server_table() -> str:
    """Adapter types by targets, and what targets do with other things than changes of linear layers."""
    targets = [each for each in FORMATS if isinstance(each, ServerFormat) and each.planned is None]
    header = ["type", *(each.title for each in targets)]
    cells = [[kind.title, *(server_cell(kind) for _ in targets)] for kind in all_types() if kind.readable]
    for layers in (EMBEDDING, CONVOLUTION, EXPERT):
        takes = ["exact" if layers in each.kinds else "refused" for each in targets]
        cells.append([f"a change of one {layers}", *takes])
    cells.append(["single tokens, `lora_bias`, biases of IA3", *("refused" for _ in targets)])
    return rows(header, cells)


def filled(text: str, parts: Mapping[str, str]) -> str:
    """A page with its generated parts in place."""
    for name, part in parts.items():
        head, marker, rest = text.partition(BEGIN.format(name))
        assert marker and END in rest, f"no place for {name}"
        text = f"{head}{marker}\n{part}\n{END}{rest.partition(END)[2]}"
    return text


def generated() -> dict[Path, str]:
    """File -> what it should hold."""
    parts = {
        DOCS / "cli.md": {"commands": command_reference()},
        DOCS / "converting.md": {"forms": form_table()},
        DOCS / "files.md": {"types": type_table()},
        DOCS / "serving.md": {"servers": server_table()},
        DOCS / "methods" / "index.md": {"methods": method_table()},
    }
    for page in dict.fromkeys(map(page_of, our_methods())):
        infos = [info for info in our_methods() if page_of(info) == page]
        parts[DOCS / "methods" / page] = {"facts": fact_table(infos), "options": option_table(infos)}
    pages = {page: filled(page.read_text(encoding="utf-8"), part) for page, part in parts.items()}
    return {**pages, DOCS / "architecture.svg": drawing()}


def main() -> None:
    """Write or check."""
    stale = {page: text for page, text in generated().items() if page.read_text(encoding="utf-8") != text}
    if "--check" in sys.argv[1:]:
        if stale:
            sys.exit(f"out of date, run make docs: {', '.join(str(page.relative_to(DOCS)) for page in stale)}")
        return
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
