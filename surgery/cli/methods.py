"""`surgery methods`."""

from __future__ import annotations

import dataclasses

import click

from surgery.catalogue import METHODS
from surgery.cli.output import show_json
from surgery.reports.tables import table


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
        rows = [
            {**dataclasses.asdict(info), "options": sorted(info.options), "module": f"surgery.methods.{info.module}"}
            for info in METHODS.values()
        ]
        show_json({"command": "methods", "methods": rows})
        return
    if quiet:
        click.echo("\n".join(METHODS))
        return
    cells = [
        [i.name, i.peft_type, i.change, str(i.rank or "-"), f"{i.learning_rate:g}" if i.learning_rate else "-", i.paper]
        for i in METHODS.values()
    ]
    click.echo(table(["method", "PEFT type", "weight change", "rank", "lr", "paper"], cells, right=(3, 4)))
    click.echo()
    for info in METHODS.values():
        click.echo(f"{info.name}: trains {info.trains}; stores {info.stores}.")
