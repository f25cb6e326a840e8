"""`surgery convert`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import common_options, resume_option, set_verbosity, task_option
from surgery.cli.output import note, progress_bar, show, show_json, summary, table, written
from surgery.storage.hub_cache import check_names
from surgery.system.text import human_bytes

if TYPE_CHECKING:
    from surgery.converters.report import ConvertReport

UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
BUDGETS = ("rank", "energy", "max_error", "size", "ratio")


class Size(click.ParamType[int]):
    """A number of bytes, with or without a unit: `65536`, `64KiB`, `1.5MB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if found is None or found[2].upper() not in UNITS:
            self.fail(f"{value!r} is no size: give bytes, or a unit as in 64KiB or 1.5MB", param, ctx)
        return int(float(found[1]) * UNITS[found[2].upper()])


@click.command("convert")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--to", type=click.Choice(["giva", "vera", "lora", "frod", "smoa"]), required=True, help="Form of the result."
)
@click.option("-o", "--out", metavar="OUT", help="Folder to write. [default: <adapter>-<form>]")
@click.option("--base", metavar="MODEL", help="Their base model: a folder or a Hub id.")
@click.option("--data", metavar="FILE", help="Calibration data, as for init; labels are not needed.")
@click.option("--samples", type=int, default=512, show_default=True, metavar="N", help="Samples to calibrate with.")
@click.option("--batch-size", type=int, default=32, show_default=True, metavar="N", help="Samples run at a time.")
@click.option("--max-length", type=int, metavar="T", help="Tokens of the longest sample.  [default: up to 512]")
@click.option("--rank", type=int, metavar="R", help="Budget: rank of each layer; vera: of the shared bases.")
@click.option("--energy", type=float, metavar="E", help="Budget: share of each layer's squared norm to keep.")
@click.option("--max-error", type=float, metavar="E", help="Budget: largest relative error, over all layers together.")
@click.option("--size", type=Size(), metavar="BYTES", help="Budget: size of the file, as in 64KiB.")
@click.option("--ratio", type=float, metavar="X", help="Budget: old size over new.  [default for giva: 20]")
@click.option(
    "--bits", type=click.Choice(["auto", "32", "16", "8", "4", "3", "2"]), help="giva: of a number.  [default: auto]"
)
@click.option(
    "--basis", type=click.Choice(["fitted", "random"]), help="vera: where A and B come from.  [default: fitted]"
)
@click.option(
    "--variant",
    type=click.Choice(["components", "blocks"]),
    help="smoa: components of the spectrum, or blocks, as published, which hold about half of a general change and "
    "want --accept-loss.  [default: components]",
)
@click.option(
    "--recover", type=int, metavar="STEPS", help="Steps in which the result learns the original's answers on the data."
)
@click.option("--accept-loss", is_flag=True, help="Write even what keeps less than half of the adapter.")
@click.option("--stats", metavar="FILE", help="Calibration statistics: read where FILE exists, else written there.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float8_e4m3fn"]),
    help="Type of the stored factors. [default: the adapter's]",
)
@task_option()
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option("--dry-run", is_flag=True, help="Do all but write.")
@click.option("--force", is_flag=True, help="Replace OUT where it exists.")
@resume_option()
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with MODEL.")
@common_options()
def command(
    adapters: tuple[str, ...],
    to: str,
    out: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Bring a trained adapter into another form, and say what it loses.

    ADAPTER is a folder or a Hub id. giva stores it in few bits; lora is what everything loads; vera, frod and
    smoa are best fits. With --base and --data errors are measured in what they do to the model's predictions. Several
    adapters of one base share its calibration; OUT then gets a folder for each.

    \b
    Examples:
      surgery convert lora/ --to giva --ratio 40
      surgery convert lora/ --to giva --base model/ --data texts.jsonl
      surgery convert vera/ --to lora --base model/
    """
    given = [name for name in BUDGETS if options[name] is not None]
    if len(given) > 1:
        raise click.UsageError("give one of " + ", ".join(f"--{name.replace('_', '-')}" for name in given))
    if options["bits"] is not None and to != "giva":
        raise click.UsageError(f"--bits belongs to giva; {to} takes --dtype")
    if options["basis"] is not None and to != "vera":
        raise click.UsageError("--basis belongs to vera")
    if options["variant"] is not None and to != "smoa":
        raise click.UsageError("--variant belongs to smoa")
    if options["recover"] is not None and (options["base"] is None or options["data"] is None):
        raise click.UsageError("--recover trains on data with the base model: give --base and --data")
    if options["base"] is None and (options["data"] is not None or options["stats"] is not None):
        raise click.UsageError("--data and --stats say something about the base model: give it with --base MODEL")
    check_names(*adapters, options["base"])
    set_verbosity(verbose, quiet)
    from surgery.converters.convert import convert

    several = len(adapters) > 1
    folder = out or (f"converted-{to}" if several else f"{_name(adapters[0])}-{to}")
    with progress_bar(f"convert to {to}", wanted=not quiet and not as_json) as progress:
        found = convert(list(adapters) if several else adapters[0], to, folder, progress=progress, **options)
    reports = [report for _, report in (found if several else [found])]
    if as_json:
        result = reports[0].to_dict() if not several else _several(reports, folder, to)
        show_json(result)
    elif quiet:
        for report in reports:
            show(written(report.out, report.bytes))
    elif several:
        _show_several(reports)
    else:
        _show(reports[0], verbose)


def _name(adapter: str) -> str:
    return Path(adapter.partition("@")[0]).resolve().name


def _several(reports: list[ConvertReport], out: str, to: str) -> dict[str, Any]:
    return {
        "command": "convert",
        "out": out,
        "to": to,
        "bytes": sum(report.bytes for report in reports),
        "source_bytes": sum(report.source_bytes for report in reports),
        "seconds": sum(report.seconds for report in reports),
        "adapters": [report.to_dict() for report in reports],
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"


def _show_several(reports: list[ConvertReport]) -> None:
    rows = [
        [r.source, human_bytes(r.source_bytes), human_bytes(r.bytes), f"{r.ratio:.1f} x", _percent(r.weight_error),
         _percent(r.output_error), _percent(r.agreement), "-" if r.kl is None else f"{r.kl:.2e}"]
        for r in reports
    ]  # fmt: skip
    header = ["adapter", "was", "is", "ratio", "weight error", "output error", "agreement", "KL"]
    show(table(header, rows, right=(1, 2, 3, 4, 5, 6, 7)))


def _show(report: ConvertReport, verbose: bool) -> None:
    for line in report.notes:
        note(f"Note: {line}")
    if verbose:
        rows = [
            [s.module, f"{s.shape[0]} x {s.shape[1]}", f"{s.source_rank} to {s.rank}",
             f"{s.bits:.2f}" if s.bits is not None else "-", human_bytes(s.bytes), _percent(s.weight_error),
             _percent(s.output_error)]
            for s in report.sites
        ]  # fmt: skip
        header = ["module", "shape", "rank", "bits", "size", "weight error", "output error"]
        show(table(header, rows, right=(1, 2, 3, 4, 5, 6)) + "\n")
    planned = "would be " if report.dry_run else ""
    lines = [
        ("source", f"{report.source}, {report.source_type}, {human_bytes(report.source_bytes)}"),
        ("result", f"{planned}{report.peft_type}, {human_bytes(report.bytes)}: {report.ratio:.1f} x smaller"),
        ("layers", f"{report.modules:,} of {len(report.sites):,} keep a change"),
        ("weight error", f"{_percent(report.weight_error)} of the change's norm"),
    ]
    if report.output_error is not None:
        lines.append(("output error", f"{_percent(report.output_error)} of what it adds to the layers' outputs"))
    if report.kl is not None:
        lines.append(("predictions", f"KL {report.kl:.2e} nats, {_percent(report.agreement)} top-1 agreement"))
    if report.reload_difference is not None:
        lines.append(("reopened", f"differs by {report.reload_difference:.1e} at most"))
    lines.append(("time", f"{report.seconds:.2f} s on {report.device}"))
    lines.append(("dry run", "nothing written") if report.dry_run else ("written", str(report.out)))
    show(summary(lines))
    if report.kl is None and not report.dry_run and report.weight_error > 0:
        show("\nWhat that does to predictions: give --base MODEL --data FILE; they also make the result better.")
