"""`surgery methods`."""

from __future__ import annotations

import dataclasses

import click

from surgery.cli.output import show, show_json, table
from surgery.methods.registry import method_infos, method_names


@click.command("methods")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the names.")
def command(as_json: bool, quiet: bool) -> None:
    """List the adapter methods: what each changes, trains and stores.

    \b
    Example:
      surgery methods
    """
    if as_json:
        rows = [{**dataclasses.asdict(info), "options": sorted(info.options)} for info in method_infos()]
        show_json({"command": "methods", "methods": rows})
        return
    if quiet:
        show("\n".join(method_names()))
        return
    cells = [[i.name, i.change, str(i.rank or "-"), f"{i.training_rate:g}", i.peft_type] for i in method_infos()]
    show(table(["method", "weight change", "rank", "lr", "PEFT type"], cells, right=(2, 3)))
    for info in method_infos():
        show(f"\n{info.name}: {info.title}, {info.paper}")
        show(f"  trains {info.trains}")
        show(f"  stores {info.stores}")
