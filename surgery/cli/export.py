"""`surgery export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import common_options, set_verbosity
from surgery.cli.output import note, progress_bar, show, show_json, summary, table, written
from surgery.storage.hub_cache import check_names
from surgery.system.text import human_bytes

if TYPE_CHECKING:
    from surgery.exporting.report import ExportReport


@click.command("export")
@click.argument("adapter")
@click.option(
    "--for",
    "to",
    required=True,
    metavar="TARGET",
    help="Server that is to read it: vllm, sglang, llama.cpp, ollama, mlx (diffusers and kohya are not written yet).",
)
@click.option("-o", "--out", metavar="OUT", help="Folder to write. [default: <adapter>-<target>]")
@click.option("--base", metavar="MODEL", help="Base model of ADAPTER, a folder or a Hub id: for llama.cpp and ollama.")
@click.option("--rank", type=int, metavar="R", help="Cut every layer to at most this rank.")
@click.option("--energy", type=float, metavar="E", help="Cut to the rank that keeps this share (0-1) of every layer.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "q8_0"]),
    help="Type of the written numbers; q8_0 for llama.cpp and ollama. [default: as in ADAPTER]",
)
@click.option(
    "--dry-run", is_flag=True, help="Say whether the server takes it and what it would compute; write nothing."
)
@click.option("--overwrite", "--force", "force", is_flag=True, help="Replace OUT where it exists.")
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@common_options()
def command(adapter: str, to: str, out: str | None, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Write an adapter for a server, so that it computes what PEFT does.

    ADAPTER is a folder or a Hub id, of any type that is read. The result has one rank and one scale for all layers, and
    is read back by the server's own rule. What the server cannot hold is refused by name; types of full rank are cut
    where --rank or --energy says so, and the error is reported.

    \b
    Examples:
      surgery export lora/ --for vllm -o lora-vllm/
      surgery export lora/ --for llama.cpp --base model/ --dtype float16
      surgery export dora/ --for sglang --base model/ --rank 32 --dry-run
    """
    check_names(adapter, options["base"])
    set_verbosity(verbose, quiet)
    from surgery.exporting.export import export, export_targets

    if to not in export_targets():
        raise click.BadParameter(f"{to!r} is not one of {', '.join(export_targets())}", param_hint="'--for'")
    folder = out or f"{Path(adapter.partition('@')[0]).resolve().name}-{to}"
    with progress_bar("export", wanted=not quiet) as progress:
        report = export(adapter, to, folder, progress=progress, **options)
    if as_json:
        show_json(report.to_dict())
    elif quiet:
        show(written(report.out, report.bytes))
    else:
        _show(report, verbose)


def _show(report: ExportReport, verbose: bool) -> None:
    for line in report.notes:
        note(f"Note: {line}")
    if verbose:
        rows = [
            [s.module, s.name, f"{s.shape[0]} x {s.shape[1]}", str(s.source_rank), _error(s.weight_error)]
            for s in report.sites
        ]
        show(table(["module", "in the file", "shape", "rank", "|dW - dW'| / |dW|"], rows, right=(2, 3, 4)) + "\n")
    padding = f", {human_bytes(report.padding_bytes)} of it zeros" if report.padding_bytes else ""
    kind = "exact but for rounding" if report.exact else "cut"
    lines = [
        ("adapter", f"{report.source}, {report.peft_type}, {human_bytes(report.source_bytes)}"),
        ("for", f"{report.title}: {report.modules:,} layers of rank {report.rank}, {report.dtype}"),
        ("file", f"{'would be ' if report.dry_run else ''}{human_bytes(report.bytes)}{padding}"),
        ("change", f"{kind}: the server's dW differs by {_error(report.weight_error)}"),
    ]
    lines += [(name.replace("_", " "), str(value)) for name, value in report.settings.items()]
    lines += [("serve" if n == 0 else "", line) for n, line in enumerate(report.commands)]
    lines.append(("time", f"{report.seconds:.2f} s"))
    lines.append(("dry run", "nothing written") if report.dry_run else ("written", str(report.out)))
    show(summary(lines))


def _error(value: float) -> str:
    return f"{value:.2%}" if value >= 1e-3 or value == 0 else f"{value:.1e}"
