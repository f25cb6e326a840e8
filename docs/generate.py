"""Write the parts of the docs that come from the code: the command-line reference and the method table.

python docs/generate.py           writes docs/cli.md and the table in docs/methods.md
python docs/generate.py --check   exits with 1 where they are out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from surgery.catalogue import METHODS
from surgery.cli.main import cli

DOCS = Path(__file__).parent
BEGIN, END = "<!-- generated: methods -->", "<!-- end -->"


def command_reference() -> str:
    """`--help` of the program and of every command, at 80 columns."""
    parts = ["# Command line\n\nGenerated from `--help` by `make docs`.\n"]
    root = cli.make_context("surgery", [], resilient_parsing=True, terminal_width=80)
    parts.append(f"## surgery\n\n```text\n{cli.get_help(root)}\n```\n")
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = command.make_context(name, [], parent=root, resilient_parsing=True, terminal_width=80)
        parts.append(f"## surgery {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def method_table() -> str:
    """The table of methods with their defaults."""
    lines = [
        "| method | dW | trains | stored besides | PEFT type | rank | alpha | learning rate | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for info in METHODS.values():
        rank = str(info.rank) if info.rank else "-"
        alpha = "rank" if "alpha" in info.options else "-"
        lines.append(
            f"| `{info.name}` | `{info.change}` | {info.trains} | {info.stores} | `{info.peft_type}` | {rank} | "
            f"{alpha} | {info.training_rate:g} | {info.paper} |"
        )
    return "\n".join(lines)


def generated() -> dict[Path, str]:
    """File -> what it should hold."""
    methods = DOCS / "methods.md"
    text = methods.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return {
        DOCS / "cli.md": command_reference(),
        methods: f"{head}{BEGIN}\n{method_table()}\n{END}{tail}",
    }


def main() -> None:
    """Write or check."""
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        if stale:
            sys.exit(f"out of date, run make docs: {', '.join(path.name for path in stale)}")
        return
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
