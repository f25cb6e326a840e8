"""`surgery merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import check_early, common_options, layout_option, resume_option, set_verbosity, task_option
from surgery.cli.output import note, progress_bar, show, show_json, summary, table, written
from surgery.errors import listing
from surgery.storage.hub_cache import check_names
from surgery.system.text import human_bytes

if TYPE_CHECKING:
    from surgery.merging.report import MergeReport


@click.command("merge")
@click.argument("adapter")
@click.option("--base", required=True, metavar="MODEL", help="Base model of ADAPTER: a folder or a Hub id.")
@click.option("-o", "--out", metavar="OUT", help="Folder to write. [default: <adapter>-merged]")
@click.option("--dry-run", is_flag=True, help="Check everything and show the sizes; write nothing.")
@click.option("--overwrite", "--force", "force", is_flag=True, help="Replace OUT where it exists.")
@resume_option()
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the written tensors. [default: each as in MODEL]",
)
@task_option()
@layout_option()
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with MODEL.")
@common_options()
def command(
    adapter: str, base: str, out: str | None, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    """Add an adapter to its base model.

    ADAPTER is a folder or a Hub id. The result is a model folder that opens with transformers, without PEFT: the files
    of MODEL, written tensor by tensor under the same names, with W + dW in place of W.

    \b
    Examples:
      surgery merge lora/ --base model/ -o merged/
      surgery merge lora/ --base model/ --dtype bfloat16
    """
    check_names(adapter, base)
    set_verbosity(verbose, quiet)
    folder = out or f"{Path(adapter.partition('@')[0]).resolve().name}-merged"
    check_early(folder, options["force"])
    from surgery.merging.merge import merge

    with progress_bar("merge", wanted=not quiet) as progress:
        report = merge(adapter, base, folder, progress=progress, **options)
    if as_json:
        show_json(report.to_dict())
    elif quiet:
        show(written(report.out, report.bytes))
    else:
        _show(report, verbose)


def _show(report: MergeReport, verbose: bool) -> None:
    for line in report.notes:
        note(f"Note: {line}")
    if verbose and report.sites:
        rows = [[s.module, f"{s.shape[0]} x {s.shape[1]}", _share(s.change), _share(s.rounding)] for s in report.sites]
        show(table(["module", "shape", "|dW| / |W|", "rounding / |dW|"], rows, right=(1, 2, 3)) + "\n")
    dtypes = ", ".join(f"{name} {human_bytes(size)}" for name, size in report.dtypes.items())
    lines = [
        ("base", f"{report.base} as {report.model_class}"),
        ("adapter", f"{report.peft_type}, {report.modules:,} layers"),
        ("brought", f"{listing(report.replaced, 4)}" if report.replaced else "nothing besides"),
        ("file", f"{'would be ' if report.dry_run else ''}{human_bytes(report.bytes)} ({dtypes})"),
    ]
    if report.sites:
        lines.append(("change", _changes(report)))
    lines.append(("time", f"{report.seconds:.2f} s on {report.device}"))
    lines.append(("dry run", "nothing written") if report.dry_run else ("written", str(report.out)))
    show(summary(lines))


def _changes(report: MergeReport) -> str:
    changes = [site.change for site in report.sites if site.change is not None]
    rounding = [site.rounding for site in report.sites if site.rounding is not None]
    if not changes or not rounding:
        return "none"
    low, high = _share(min(changes)), _share(max(changes))
    lost = f"takes up to {_share(max(rounding))} of dW" if max(rounding) else "takes nothing"
    return f"|dW| is {low} to {high} of |W| by layer; rounding W + dW {lost}"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if value >= 1e-3 else f"{value:.1e}"
