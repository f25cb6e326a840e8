"""`surgery train`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.main import INTERRUPTED, TERMINATED, Stopped
from surgery.cli.options import (
    chat_template_option,
    check_early,
    common_options,
    resume_option,
    set_verbosity,
    task_option,
)
from surgery.cli.output import note, progress_bar, show, show_json, summary, table, written
from surgery.storage.hub_cache import check_names
from surgery.storage.output_paths import unfinished_folder
from surgery.system.text import human_bytes

if TYPE_CHECKING:
    from surgery.training.evaluation import Evaluation
    from surgery.training.report import TrainReport


@click.command("train")
@click.argument("adapter")
@click.option("--base", metavar="MODEL", required=True, help="Its base model: a folder or a Hub id.")
@click.option("--data", metavar="FILE", required=True, help=".jsonl, .txt, .csv or .parquet; for images also a folder.")
@click.option("--eval-data", metavar="FILE", help="Evaluate on this, before and after.  [default: the first of --data]")
@click.option("--teacher", metavar="ADAPTER", help="Learn to answer as this adapter does; no labels are needed.")
@click.option(
    "--max-steps", "--steps", "steps", type=int, default=200, show_default=True, metavar="N", help="Optimizer steps."
)
@click.option(
    "--learning-rate",
    "--lr",
    "lr",
    type=float,
    metavar="LR",
    help="Learning rate.  [default: the method's, see surgery methods]",
)
@click.option("-o", "--out", metavar="OUT", help="Folder to write. [default: <adapter>-trained]")
@click.option("--batch-size", type=int, default=32, show_default=True, metavar="N", help="Samples of a step.")
@click.option(
    "--gradient-accumulation-steps",
    "--accumulate",
    "accumulate",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Run a step in N parts.",
)
@click.option("--max-length", type=int, metavar="T", help="Tokens of the longest sample.  [default: up to 512]")
@chat_template_option()
@click.option(
    "--lr-scheduler-type",
    "--schedule",
    "schedule",
    default="linear",
    show_default=True,
    metavar="NAME",
    help="Of the rate: linear, cosine, constant, ...",
)
@click.option(
    "--warmup-ratio",
    "--warmup",
    "warmup",
    type=float,
    default=0.0,
    metavar="F",
    help="Share of the steps in which the rate rises.",
)
@click.option("--only", multiple=True, metavar="PART", help="Train this alone: giva_s, lora_A, classifier. Repeatable.")
@click.option("--hidden-weight", type=float, metavar="W", help="Teacher: weight of the hidden states.  [default: 1]")
@click.option("--cache-teacher", is_flag=True, help="Teacher: keep up to 1 GiB of its answers for later epochs.")
@click.option(
    "--save-steps",
    "--save-every",
    "save_every",
    type=int,
    metavar="N",
    help="Steps between checkpoints.  [default: a tenth of them]",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Compute activations twice instead of holding them.")
@task_option("the adapter's")
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the base in memory; the adapter trains in float32.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option("--new-head", is_flag=True, help="Make a head for the labels of FILE, for --task seq-cls or image-cls.")
@click.option("--dry-run", is_flag=True, help="Check everything; train and write nothing.")
@click.option(
    "--overwrite",
    "--force",
    "force",
    is_flag=True,
    help="Replace OUT where it exists, and an unfinished training of it.",
)
@resume_option()
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with MODEL.")
@common_options()
def command(
    adapter: str,
    out: str | None,
    teacher: str | None,
    hidden_weight: float | None,
    cache_teacher: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Train an adapter, or let it learn from another one.

    What the adapter's type trains is trained, and the heads that it carries; all else stays as it is. The training
    is transformers' Trainer; under torchrun or accelerate launch several processes share each batch. Ctrl-C and
    SIGTERM end it after the step at hand: the adapter is saved, and the same command goes on.

    \b
    Examples:
      surgery train start/ --base model/ --data train.jsonl --eval-data test.jsonl
      surgery train small/ --base model/ --data texts.txt --teacher lora/
    """
    if teacher is None and (hidden_weight is not None or cache_teacher):
        raise click.UsageError("--hidden-weight and --cache-teacher belong to a training with --teacher")
    check_names(adapter, teacher, options["base"])
    set_verbosity(verbose, quiet)
    folder = out or f"{Path(adapter.partition('@')[0]).resolve().name}-trained"
    if not (options["resume"] and unfinished_folder(Path(folder)).is_dir()) and os.environ.get("RANK", "0") == "0":
        check_early(folder, options["force"])
    from surgery.training.interruption import TrainingInterrupted
    from surgery.training.train import train

    given: dict[str, Any] = {**options, "cache_teacher": cache_teacher}
    if hidden_weight is not None:
        given["hidden_weight"] = hidden_weight
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes the first one speaks
    with progress_bar("train", wanted=not quiet, unit="step") as progress:
        try:
            _, report = train(
                adapter, out=folder, teacher=teacher, progress=progress, announce=None if quiet else note, **given
            )
        except TrainingInterrupted as stopped:
            code = TERMINATED if stopped.signal == signal.SIGTERM else INTERRUPTED
            if not first:
                raise click.exceptions.Exit(code) from None
            raise Stopped(
                f"Interrupted after step {stopped.step}; {stopped.out} holds the adapter; the same command goes on.",
                code,
            ) from None
    if not first:
        return
    if as_json:
        show_json(report.to_dict())
    elif quiet:
        show(written(report.out, report.bytes))
    else:
        _show(report)


def _show(report: TrainReport) -> None:
    for line in report.notes:
        note(f"Note: {line}")
    rows = [_row(name, found) for name, found in (("before", report.before), ("after", report.after)) if found]
    if rows:
        used = [index for index in range(len(HEADER)) if index == 0 or any(row[index] != "-" for row in rows)]
        cells = [[row[index] for index in used] for row in rows]
        show(table([HEADER[index] for index in used], cells, right=range(1, len(used))) + "\n")
    what = "the teacher's answers" if report.teacher is not None else "the data"
    where = "held-out data" if report.evaluated_on == "eval_data" else "samples that were trained on"
    lines = [
        ("adapter", f"{report.peft_type}, {report.modules:,} layers, on {report.base} as {report.model_class}"),
        ("trained", f"{report.trainable_parameters:,} parameters: {', '.join(report.trained)}"),
        ("learnt from", f"{what}: {report.samples:,} samples, {report.batch_size} a step"),
        ("steps", f"{report.steps_done:,} of {report.steps:,} at a learning rate of {report.learning_rate:g}"),
        ("evaluated on", f"{report.before.items:,} items of {where}" if report.before is not None else "-"),
        ("file", human_bytes(report.bytes)),
        ("time", f"{report.seconds:.2f} s on {report.device}" + _pace(report)),
        ("dry run", "nothing trained, nothing written") if report.dry_run else ("written", str(report.out)),
    ]
    show(summary([line for line in lines if line[1] != "-"]))


HEADER = ["", "loss", "accuracy", "perplexity", "KL to the teacher", "agreement"]


def _row(name: str, found: Evaluation) -> list[str]:
    def number(value: float | None, form: str = ".4g") -> str:
        return "-" if value is None else format(value, form)

    accuracy = found.value if found.score == "accuracy" else None
    perplexity = found.value if found.score == "perplexity" else None
    return [
        name, number(found.loss), number(accuracy, ".2%"), number(perplexity), number(found.kl),
        number(found.agreement, ".2%"),
    ]  # fmt: skip


def _pace(report: TrainReport) -> str:
    return "" if report.seconds_per_step is None else f", {report.seconds_per_step:.3f} s a step"
