"""`surgery init`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.catalogue import METHODS, TASK_TABLE
from surgery.cli.options import (
    common_options,
    compute_options,
    output_options,
    refuse_idle_options,
    set_verbosity,
)
from surgery.cli.output import note, progress_bar, show_json
from surgery.errors import listing
from surgery.reports.tables import human_bytes, summary, table

if TYPE_CHECKING:
    from surgery.reports.report import Report

FLAGS = {
    "rank": "--rank",
    "alpha": "--alpha",
    "sparse_rate": "--sparse-rate",
    "groups": "--groups",
    "store_bases": "--no-store-bases",
}


@click.command("init")
@click.argument("model")
@click.option("--method", type=click.Choice(list(METHODS)), required=True, help="Adapter method; see surgery methods.")
@output_options()
@click.option("--rank", type=int, metavar="R", help="Rank of the adapter.")
@click.option("--alpha", type=float, metavar="A", help="Scale is A / R.  [default: R]")
@click.option("--sparse-rate", type=float, metavar="F", help="frod: share of S that trains.  [default: 0.01]")
@click.option("--groups", type=int, metavar="K", help="smoa: number of spectral groups.  [default: 2]")
@click.option(
    "--no-store-bases",
    "store_bases",
    flag_value=False,
    type=bool,
    default=None,
    help="Leave the frozen bases out of the file; they are regenerated on load, and checked.",
)
@click.option(
    "--target",
    multiple=True,
    metavar="NAME_OR_REGEX",
    help="Modules to adapt: names, endings of names, or regular expressions. Repeatable. [default: all-linear]",
)
@click.option(
    "--task", type=click.Choice(list(TASK_TABLE)), help="Task, which chooses the model class. [default: config.json's]"
)
@compute_options()
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with MODEL.")
@common_options()
def command(
    model: str, method: str, out: str | None, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    """Make an adapter that starts well from a base model.

    MODEL is a folder with config.json and safetensors, or a Hub id. It is read one weight at a time and never
    changed. The result opens with PeftModel.from_pretrained, after `import surgery` for all methods but vera.

    \b
    Examples:
      surgery init --method frod model/
      surgery init --method inilora --rank 16 --target q_proj --target v_proj model/ -o start/
    """
    refuse_idle_options(method, FLAGS, options)
    set_verbosity(verbose, quiet)
    from surgery.initialization import init

    name = Path(model).resolve() if os.path.isdir(model) else Path(model.partition("@")[0])
    folder = out or f"{name.name}-{method}"
    with progress_bar(f"init {method}", wanted=not quiet and not as_json) as progress:
        _, report = init(model, method, folder, progress=progress, **options)
    if as_json:
        show_json(report.to_dict())
    elif quiet:
        click.echo(report.out if report.out is not None else human_bytes(report.bytes))
    else:
        _show(report, verbose)


def _show(report: Report, verbose: bool) -> None:
    for line in report.notes:
        note(f"Note: {line}")
    for reason in dict.fromkeys(report.not_adapted.values()):
        names = [name for name, why in report.not_adapted.items() if why == reason]
        note(f"Note: not adapted: {listing(names, 3)} ({reason})")
    if verbose:
        rows = [
            [
                s.module,
                f"{s.shape[0]} x {s.shape[1]}",
                str(s.rank or "-"),
                f"{s.parameters:,}",
                human_bytes(s.bytes),
                f"{s.captured:.1%}" if s.captured is not None else "-",
            ]
            for s in report.sites
        ]
        header = ["module", "shape", "rank", "parameters", "size", "captured"]
        click.echo(table(header, rows, right=(1, 2, 3, 4, 5)) + "\n")
    planned = "would be " if report.dry_run else ""
    written = ("dry run", "nothing written") if report.dry_run else ("written", str(report.out))
    info = METHODS[report.method]
    click.echo(
        summary(
            [
                ("method", f"{info.title}, {info.paper}: dW = {info.change}"),
                ("base", f"{report.base} as {report.model_class}"),
                ("layers", f"{report.modules:,} adapted"),
                ("trainable", f"{report.trainable_parameters:,} parameters"),
                ("file", f"{planned}{human_bytes(report.bytes)}"),
                ("time", f"{report.seconds:.2f} s on {report.device}"),
                written,
            ]
        )
    )
    if not report.dry_run:
        imported = "" if report.peft_type == "VERA" else "import surgery; "
        click.echo(f'\nLoad it:  {imported}PeftModel.from_pretrained(base, "{report.out}", is_trainable=True)')
