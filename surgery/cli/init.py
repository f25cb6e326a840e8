"""`surgery init`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import (
    chat_template_option,
    check_early,
    common_options,
    compute_options,
    output_options,
    refuse_idle_options,
    resume_option,
    set_verbosity,
    task_option,
)
from surgery.cli.output import note, progress_bar, show, show_json, summary, table, written
from surgery.errors import listing
from surgery.methods.catalogue import MethodInfo
from surgery.methods.registry import method_info, method_names
from surgery.storage.hub_cache import check_names
from surgery.system.text import human_bytes

if TYPE_CHECKING:
    from surgery.initialization.report import Report

LABELLED_TASKS = ("seq-cls", "image-cls")
FLAGS = {
    "rank": "--rank",
    "alpha": "--alpha",
    "sparse_rate": "--sparse-rate",
    "groups": "--groups",
    "branch_ranks": "--branch-ranks",
    "store_bases": "--no-store-bases",
    "data": "--data",
    "samples": "--samples",
    "batch_size": "--batch-size",
    "max_length": "--max-length",
    "gradient_checkpointing": "--gradient-checkpointing",
    "variant": "--variant",
    "split": "--split",
}


def parsed_split(values: tuple[str, ...]) -> dict[str, int | list[int]] | None:
    """`NAME=N` or `NAME=A,B,C` as a dictionary; None where nothing was given."""
    found: dict[str, int | list[int]] = {}
    for value in values:
        name, _, numbers = value.partition("=")
        try:
            parts = [int(number) for number in numbers.split(",")]
        except ValueError:
            parts = []
        if not name or not parts or min(parts) < 1:
            raise click.BadParameter(f"{value!r} is not NAME=N or NAME=A,B,C", param_hint="'--split'")
        found[name] = parts if len(parts) > 1 else parts[0]
    return found or None


def parsed_ranks(value: str | None) -> list[int] | None:
    """`R,R` as a list; None where nothing was given."""
    if value is None:
        return None
    try:
        return [int(rank) for rank in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not R,R: ranks with commas between", param_hint="'--branch-ranks'"
        ) from None


@click.command("init")
@click.argument("model")
@click.option("--method", type=click.Choice(method_names()), required=True, help="Adapter method; see surgery methods.")
@output_options()
@resume_option()
@click.option("--rank", type=int, metavar="R", help="Rank of the adapter.")
@click.option("--lora-alpha", "--alpha", "alpha", type=float, metavar="A", help="Scale is A / R.  [default: R]")
@click.option("--sparse-rate", type=float, metavar="F", help="frod: share of S that trains.  [default: 0.01]")
@click.option("--groups", type=int, metavar="K", help="smoa: number of blocks.  [default: 2]")
@click.option(
    "--branch-ranks",
    metavar="R,R",
    callback=lambda context, parameter, value: parsed_ranks(value),
    help="smoa: the rank of each block.  [default: R split evenly]",
)
@click.option(
    "--no-store-bases",
    "store_bases",
    flag_value=False,
    type=bool,
    default=None,
    help="Leave the frozen bases out of the file; they are regenerated on load, and checked.",
)
@click.option(
    "--data",
    metavar="FILE",
    help="giva: .jsonl, .txt, .csv or .parquet; for images also a folder. Others: labels of a --task.",
)
@click.option("--samples", type=int, metavar="N", help="giva: samples drawn from FILE.  [default: 32]")
@click.option("--batch-size", type=int, metavar="N", help="giva: samples run at a time.  [default: 32]")
@click.option("--max-length", type=int, metavar="T", help="giva: tokens of the longest sample.  [default: up to 512]")
@chat_template_option()
@click.option(
    "--gradient-checkpointing",
    is_flag=True,
    default=None,
    help="giva: compute activations twice instead of holding them.",
)
@click.option(
    "--variant",
    type=click.Choice(["vr", "vru2r", "vrur", "vrurand", "blocks", "components"]),
    help="giva: what B is: random orthonormal (vr), left singular vectors r..2r (vru2r) or 0..r (vrur), Gaussian "
    "(vrurand).  [default: vr]  smoa: blocks, as published, or components, as in 0.1.0.  [default: blocks]",
)
@click.option(
    "--split",
    multiple=True,
    metavar="NAME=N",
    callback=lambda context, parameter, value: parsed_split(value),
    help="giva: treat a fused layer as N parts, or parts of heights A,B,C. Repeatable. "
    "[default: GPT-2, Phi-3 and GLM are known]",
)
@click.option(
    "--target-modules",
    "--target",
    "target",
    multiple=True,
    metavar="NAME_OR_REGEX",
    help="Modules to adapt: names, endings of names, or regular expressions. Repeatable. [default: all-linear]",
)
@task_option()
@click.option("--num-labels", type=int, metavar="N", help="Classes of the task's head; 1 is a regression.")
@click.option("--labels", metavar="A,B,C", help="Names of the classes, in order.")
@compute_options()
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with MODEL.")
@common_options()
def command(
    model: str, method: str, out: str | None, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    """Make an adapter that starts well from a base model.

    MODEL is a folder with config.json and safetensors, or a Hub id. It is read one weight at a time and never
    changed; giva alone loads it, for one pass over the data. The result opens with PeftModel.from_pretrained, after
    `import surgery` for all methods but vera.

    \b
    Examples:
      surgery init --method frod model/
      surgery init --method giva --data train.jsonl model/
      surgery init --method inilora --rank 16 --target-modules q_proj model/
    """
    labels = options.pop("labels")
    options["labels"] = None if labels is None else [name.strip() for name in labels.split(",")]
    idle = dict(options)
    if options["task"] in LABELLED_TASKS:
        idle["data"] = None  # its labels are read
    refuse_idle_options(method, FLAGS, idle)
    if method_info(method).reads_gradients and options["data"] is None:
        raise click.UsageError(f"method {method} starts from the gradient of a loss: give its data with --data FILE")
    check_names(model)
    set_verbosity(verbose, quiet)
    name = Path(model).resolve() if os.path.isdir(model) else Path(model.partition("@")[0])
    folder = out or f"{name.name}-{method}"
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first one writes
        check_early(folder, options["force"], options["rank"])
    from surgery.initialization.init import init

    with progress_bar(f"init {method}", wanted=not quiet) as progress:
        _, report = init(model, method, folder, progress=progress, **options)
    if int(os.environ.get("RANK", "0")) > 0:  # of torchrun's processes the first one speaks
        return
    if as_json:
        show_json(report.to_dict())
    elif quiet:
        show(written(report.out, report.bytes))
    else:
        _show(report, verbose, method_info(method).of_variant(options["variant"]))


def _show(report: Report, verbose: bool, info: MethodInfo) -> None:
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
        show(table(header, rows, right=(1, 2, 3, 4, 5)) + "\n")
    planned = "would be " if report.dry_run else ""
    written = ("dry run", "nothing written") if report.dry_run else ("written", str(report.out))
    show(
        summary(
            [
                ("method", f"{info.title}, {info.paper}: dW = {info.change}"),
                ("base", f"{report.base} as {report.model_class}"),
                ("layers", f"{report.modules:,} adapted"),
                ("trainable", f"{report.trainable_parameters:,} parameters"),
                ("file", f"{planned}{human_bytes(report.bytes)}"),
                *([("loss", _loss_line(report))] if report.loss is not None else []),
                ("time", f"{report.seconds:.2f} s on {report.device}"),
                written,
            ]
        )
    )
    if not report.dry_run:
        if report.labels:
            show(f"\nIts head has {report.labels} outputs: load the base with num_labels={report.labels}")
        imported = "import surgery; " if info.own_type else ""
        show(f'\nLoad it:  {imported}PeftModel.from_pretrained(base, "{report.out}", is_trainable=True)')


def _loss_line(report: Report) -> str:
    source = f"{report.samples} samples" if report.samples is not None else "the given batches"
    return f"{report.loss:.4f} on {source}, whose gradient chose A"
