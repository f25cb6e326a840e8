"""`surgery convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import check_early, common_options, layout_option, resume_option, set_verbosity, task_option
from surgery.cli.output import aside_from_bars, load_line, note, progress_bar, show, show_json, summary, table, written
from surgery.converters.adapter_folders import adapter_folders
from surgery.converters.budget import Budget
from surgery.converters.forms import BUDGETS, FORMS
from surgery.errors import MethodError, listing
from surgery.storage.hub_cache import check_names
from surgery.system.text import human_bytes, parse_bytes

if TYPE_CHECKING:
    from surgery.converters.report import BatchEntry, BatchReport, ConvertReport

LONGEST_NAME = 40
Command = Callable[..., Any]


class Size(click.ParamType[int]):
    """A number of bytes, with or without a unit: `65536`, `64KiB`, `1.5MB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def form_options() -> Callable[[Command], Command]:
    """Return a decorator that adds the options of all forms, each with the name of the form that takes it."""

    def decorate(function: Command) -> Command:
        for form in reversed(list(FORMS)):
            for option in reversed(form.options):
                text = f"{form.name}: {option.help}."
                if option.choices:
                    kind, text = click.Choice(option.choices), f"{text}  [default: {option.default}]"
                    function = click.option(option.flag, option.name, type=kind, help=text)(function)
                else:
                    function = click.option(option.flag, option.name, is_flag=True, help=text)(function)
        return function

    return decorate


def default_ratios() -> str:
    """Return the ratios that forms take where no budget is given, for the help."""
    found = {form.name: form.default_budget["ratio"] for form in FORMS if "ratio" in form.default_budget}
    return ", ".join(f"{name}: {ratio:g}" for name, ratio in found.items())


STORED_IN = list(dict.fromkeys(dtype for form in FORMS for dtype in form.dtypes))


def making_options() -> Callable[[Command], Command]:
    """Return a decorator that adds the options by which a result is made: its budget, data, form, type and writing."""

    def decorate(function: Command) -> Command:
        options: list[Callable[[Command], Command]] = [
            click.option("--data", metavar="FILE", help="Calibration data, as for init; labels are not needed."),
            click.option(
                "--samples", type=int, default=512, show_default=True, metavar="N", help="Samples to calibrate with."
            ),
            click.option(
                "--batch-size", type=int, default=32, show_default=True, metavar="N", help="Samples run at a time."
            ),
            click.option(
                "--max-length", type=int, metavar="T", help="Tokens of the longest sample.  [default: up to 512]"
            ),
            click.option(
                "--rank", type=int, metavar="R", help="Budget: rank of each layer; vera: of the shared bases."
            ),
            click.option(
                "--energy", type=float, metavar="E", help="Budget: share of each layer's squared norm to keep."
            ),
            click.option(
                "--max-error", type=float, metavar="E", help="Budget: largest relative error, over all layers together."
            ),
            click.option("--size", type=Size(), metavar="BYTES", help="Budget: size of the whole file, as in 64KiB."),
            click.option(
                "--ratio",
                type=float,
                metavar="X",
                help="Budget: old size over new, of the factors; tensors saved whole do not count.  "
                f"[default for {default_ratios()}, or more where that keeps too little]",
            ),
            form_options(),
            click.option(
                "--recover",
                type=int,
                metavar="STEPS",
                help="Steps in which the result learns the original's answers on the data.",
            ),
            click.option("--accept-loss", is_flag=True, help="Write even what keeps less than half of the adapter."),
            click.option(
                "--chat-template", metavar="FILE", help="Chat template for data of messages, in place of the model's."
            ),
            click.option(
                "--stats", metavar="FILE", help="Calibration statistics: read from FILE; what it lacks is added."
            ),
            click.option(
                "--dtype", type=click.Choice(STORED_IN), help="Type of the stored factors. [default: the adapter's]"
            ),
            task_option(),
            click.option(
                "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N."
            ),
            click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random."),
            click.option("--plot", metavar="FILE", help="Draw size against error: .png, .svg or .pdf."),
            click.option("--dry-run", is_flag=True, help="Do all but write."),
            click.option("--overwrite", "--force", "force", is_flag=True, help="Replace OUT where it exists."),
            resume_option(),
            click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with MODEL."),
        ]
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.command("convert")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--to", type=click.Choice(FORMS.names()), required=True, help="Form of the result.")
@click.option("-o", "--out", metavar="OUT", help="Folder to write. [default: <adapter>-<form>]")
@click.option(
    "--base", multiple=True, metavar="MODEL", help="Their base model: a folder or a Hub id. Several for several bases."
)
@making_options()
@layout_option()
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes for several adapters.")
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

    ADAPTER is a folder, a Hub id, or a folder of adapters. giva stores it in few bits; lora is what everything loads;
    vera, frod and smoa are best fits. With --base and --data errors are measured in what they do to the model's
    predictions. Of several adapters each is tried, and OUT gets a folder for each; a second run skips those that are
    finished.

    \b
    Examples:
      surgery convert lora/ --to giva --ratio 40
      surgery convert lora/ --to giva --base model/ --data texts.jsonl
      surgery convert loras/ --to giva -o small/ --jobs 8
    """
    bases: tuple[str, ...] = options.pop("base")
    _check_usage(adapters, to, bases, options)
    check_names(*adapters, *bases)
    set_verbosity(verbose, quiet)
    own = {option.name for form in FORMS for option in form.options} - {"bits", "basis", "per_layer_ranks", "variant"}
    options["form_options"] = {name: options.pop(name) for name in own}
    jobs = options.pop("jobs")
    if len(adapters) > 1 or adapter_folders(Path(adapters[0])):
        folder = out or (f"converted-{to}" if len(adapters) > 1 else f"{_name(adapters[0])}-{to}")
        _convert_batch(adapters, to, folder, bases, jobs, as_json, quiet, options)
    else:
        folder = out or f"{_name(adapters[0])}-{to}"
        base = bases[0] if bases else None
        if len(bases) > 1:
            raise click.UsageError("one adapter has one base: give --base once")
        check_early(folder, options["force"])
        _convert_one(adapters[0], to, folder, base, as_json, quiet, verbose, options)


def _check_usage(adapters: tuple[str, ...], to: str, bases: tuple[str, ...], options: dict[str, Any]) -> None:
    """Refuse options that do not go together.

    Raises:
        click.UsageError: they do not.
        MethodError: a budget is no budget.
    """
    given = [name for name in BUDGETS if options[name] is not None]
    if len(given) > 1:
        raise click.UsageError("give one of " + ", ".join(f"--{name.replace('_', '-')}" for name in given))
    Budget(**{name: options[name] for name in BUDGETS})
    form = FORMS.get(to)
    assert form is not None
    own = {option.name: options[option.name] for each in FORMS for option in each.options}
    try:
        form.chosen(own)
    except MethodError as error:
        raise click.UsageError(f"--{error}") from None
    folder = Path(adapters[0])
    alone = len(adapters) == 1 and not (folder.is_dir() and not (folder / "adapter_config.json").is_file())
    if options["recover"] is not None and (options["data"] is None or not bases):
        raise click.UsageError("--recover trains on data with the base model: give --base and --data")
    if alone and not bases and (options["data"] is not None or options["stats"] is not None):
        raise click.UsageError("--data and --stats say something about the base model: give it with --base MODEL")


def _convert_one(
    adapter: str,
    to: str,
    out: str,
    base: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    options: dict[str, Any],
) -> None:
    from surgery.converters.convert import convert

    with progress_bar(f"convert to {to}", wanted=not quiet and not as_json) as progress:
        _, report = convert(adapter, to, out, base=base, progress=progress, **options)
    if as_json:
        show_json(report.to_dict())
    elif quiet:
        show(written(report.out, report.bytes))
    else:
        _show(report, verbose)
        if report.out is not None:
            show(f"\n{load_line(report.out)}")


def _convert_batch(
    adapters: tuple[str, ...],
    to: str,
    out: str,
    bases: tuple[str, ...],
    jobs: int,
    as_json: bool,
    quiet: bool,
    options: dict[str, Any],
) -> None:
    from surgery.converters.convert import convert

    rows = _Rows(quiet, as_json)
    # Layers of the adapter that is worked on; of several processes at a time, adapters that are finished.
    unit = "weight" if jobs == 1 else "adapter"
    with progress_bar(f"convert to {to}", wanted=not quiet and not as_json, unit=unit) as progress:

        def finished(entry: BatchEntry, done: int, total: int) -> None:
            with aside_from_bars():
                rows.add(entry, done, total)
            if progress is not None and jobs > 1:
                progress(done, total, entry.adapter)

        steps = progress if jobs == 1 else None
        batch = convert(
            list(adapters), to, out, base=list(bases), jobs=jobs, on_entry=finished, progress=steps, **options
        )
    if as_json:
        show_json(batch.to_dict())
    elif not quiet:
        show(_ending(batch))
    if batch.failed:
        raise click.exceptions.Exit(1)


class _Rows:
    """The table of a batch, printed row by row, and each note once."""

    header = ("adapter", "kind", "was", "is", "weight error", "answers", "time", "state")
    widths = (24, 13, 10, 10, 12, 14, 8, 0)

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json = quiet, as_json
        self._noted: set[str] = set()
        self._begun = False

    def add(self, entry: BatchEntry, done: int, total: int) -> None:
        """Print an entry."""
        if self.quiet or self.as_json:
            if self.quiet and not self.as_json and entry.report is not None:
                show(written(entry.report.out, entry.report.bytes))
            if entry.error is not None:
                note(f"Error: {entry.adapter}: {entry.error}")
            return
        if not self._begun:
            self._begun = True
            show(self._line(self.header))
        show(self._line(_cells(entry)))
        for line in entry.report.notes if entry.report is not None else ():
            if line not in self._noted:
                self._noted.add(line)
                note(f"Note: {entry.adapter}: {line}")

    def _line(self, cells: tuple[str, ...]) -> str:
        first, *others = zip(cells, self.widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])


def _cells(entry: BatchEntry) -> tuple[str, ...]:
    report = entry.report
    name = entry.adapter if len(entry.adapter) <= LONGEST_NAME else f"{entry.adapter[: LONGEST_NAME - 1]}…"
    state = entry.state if entry.error is None else f"{entry.state}: {' '.join(entry.error.split())}"
    time = f"{entry.seconds:.1f} s"
    if report is None:
        return name, entry.kind or "-", "-", "-", "-", "-", time, state
    answers = _percent(report.output_error)
    if report.kl is not None:
        answers = f"KL {report.kl:.2e}"
    elif report.cosine is not None:
        answers = f"cos {report.cosine:.6f}"
    sizes = human_bytes(report.source_bytes), human_bytes(report.bytes)
    return name, entry.kind or "-", *sizes, _percent(report.weight_error), answers, time, state


def _ending(batch: BatchReport) -> str:
    """The line below the table."""
    counts = {state: sum(entry.state == state for entry in batch.entries) for state in ("done", "skipped", "failed")}
    reports = [entry.report for entry in batch.entries if entry.report is not None]
    sizes = human_bytes(sum(r.source_bytes for r in reports)), human_bytes(sum(r.bytes for r in reports))
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    written = next((report.out for report in reports if report.out is not None), None)
    place = f" in {batch.out}" if written is not None else ""
    ending = f"\n{said}: {sizes[0]} to {sizes[1]}{place}, {batch.seconds:.1f} s"
    return ending if written is None else f"{ending}\n{load_line(written)}"


def _name(adapter: str) -> str:
    return Path(adapter.partition("@")[0]).resolve().name


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f} x smaller" if ratio >= 1 else f"{1 / max(ratio, 1e-9):.1f} x larger"


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
    show(summary(result_lines(report)))
    if report.output_error is None and not report.dry_run and report.weight_error > 0:
        show("\nWhat that does to predictions: give --base MODEL --data FILE; they also make the result better.")


def result_lines(report: ConvertReport) -> list[tuple[str, str]]:
    """Return the lines of a report: name and figure."""
    planned = "would be " if report.dry_run else ""
    of_bf16 = ""
    if report.source_bytes_bf16 is not None:
        saved = report.source_bytes - report.source_bytes_bf16
        factors = (report.bytes - report.saved_bytes) * report.ratio
        of_bf16 = f" ({_times(report.ratio * (factors - saved) / factors)} than it is in bfloat16)"
    lines = [
        ("source", f"{report.source}, {report.source_type}, {human_bytes(report.source_bytes)}"),
        ("result", f"{planned}{report.peft_type}, {human_bytes(report.bytes)}: {_times(report.ratio)}{of_bf16}"),
    ]
    if report.saved_bytes:
        names = listing(report.saved_modules, 3)
        lines.append(("besides", f"{human_bytes(report.saved_bytes)} {names} kept as it is, not in that ratio"))
    lines += [
        ("layers", f"{report.modules:,} of {len(report.sites):,} keep a change"),
        ("weight error", f"{_percent(report.weight_error)} of the change's norm"),
    ]
    if report.output_error is not None:
        lines.append(("output error", f"{_percent(report.output_error)} of what it adds to the layers' outputs"))
    lines += _answers(report)
    lines.append(("kept", f"{report.kept:.1%} of the adapter"))
    if report.gain_bytes:
        layers = sum(site.gains is not None for site in report.sites)
        lines.append(("gains", f"{human_bytes(report.gain_bytes)}, of {layers:,} layers, on the base weight"))
    if report.padding_bytes:
        lines.append(("padding", f"{human_bytes(report.padding_bytes)} of zeros, for one rank in all layers"))
    if report.reload_difference is not None:
        lines.append(("reopened", f"differs by {report.reload_difference:.1e} at most"))
    lines.append(("time", f"{report.seconds:.2f} s on {report.device}"))
    lines.append(("dry run", "nothing written") if report.dry_run else ("written", str(report.out)))
    return lines


def _answers(report: ConvertReport) -> list[tuple[str, str]]:
    lines = []
    if report.kl is not None:
        lines.append(("predictions", f"KL {report.kl:.2e} nats, {_percent(report.agreement)} top-1 agreement"))
    if report.perplexity is not None:
        lines.append(("perplexity", f"{report.perplexity:.3f}, the source's {report.source_perplexity:.3f}"))
    if report.cosine is not None:
        lines.append(("embeddings", f"cosine {report.cosine:.6f}, loss {1 - report.cosine:.2e}"))
    if report.squared_error is not None:
        lines.append(("outputs", f"mean squared difference {report.squared_error:.2e}"))
    return lines
