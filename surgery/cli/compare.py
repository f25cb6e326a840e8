"""`surgery compare`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import chat_template_option, common_options, set_verbosity, task_option
from surgery.cli.output import note, progress_bar, show, show_json, summary, table
from surgery.errors import listing
from surgery.storage.hub_cache import check_names
from surgery.system.text import human_bytes

if TYPE_CHECKING:
    from surgery.comparison.report import ComparedAdapter, ComparedSite, Comparison, Costs

# Options that say something about the data alone.
DATA_FLAGS = {
    "samples": "--samples",
    "batch_size": "--batch-size",
    "max_length": "--max-length",
    "chat_template": "--chat-template",
    "dtype": "--dtype",
    "latency": "--no-latency",
}
NOT_FASTER = (
    "Times are of the adapter beside the base weights, as PEFT runs it: a smaller file is not a faster model; surgery\n"
    "merge makes one without an adapter."
)


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--base", metavar="MODEL", help="Base model of both: a folder or a Hub id.")
@click.option(
    "--data",
    metavar="FILE",
    help="Compare answers too: .jsonl, .txt, .csv or .parquet; for images also a folder. Labels are not needed.",
)
@click.option("--samples", type=int, metavar="N", help="Samples drawn from FILE.  [default: 512]")
@click.option("--batch-size", type=int, metavar="N", help="Samples run at a time.  [default: 32]")
@click.option("--max-length", type=int, metavar="T", help="Tokens of the longest sample.  [default: up to 512]")
@chat_template_option()
@click.option(
    "--no-latency",
    "latency",
    flag_value=False,
    type=bool,
    default=None,
    help="Do not time forward passes of the base, of A and of B.",
)
@click.option("--plot", metavar="FILE.png", help="Draw a heat map, layers by roles (.png, .svg or .pdf).")
@task_option()
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), help="Type of the loaded model.  [default: float32]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option("--trust-remote-code", is_flag=True, help="Run model code that comes with MODEL.")
@common_options()
def command(a: str, b: str, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Say how far adapter B is from adapter A.

    A and B are folders or Hub ids, of any types, for one base model. Without more the files are compared: weight
    errors by layer and overall, bytes, ranks, heads. With --base and --data the base is loaded once and carries both:
    errors of the layers' outputs, KL divergence, agreement, accuracy or perplexity where there are labels, time and
    memory.

    \b
    Examples:
      surgery compare lora/ small/ --base model/ --data test.jsonl
      surgery compare lora/ small/ --plot errors.png
    """
    if options["data"] is None:
        idle = [flag for name, flag in DATA_FLAGS.items() if options[name] is not None]
        if idle:
            raise click.UsageError(f"without --data there is nothing for {listing(idle)} to do")
    elif options["base"] is None:
        raise click.UsageError("--data needs the base model whose answers are compared: give it with --base MODEL")
    if options["task"] is not None and options["base"] is None:
        raise click.UsageError("--task chooses the class of the base model: give it with --base MODEL")
    check_names(a, b, options["base"])
    set_verbosity(verbose, quiet)
    from surgery.comparison.compare import compare

    given = {name: value for name, value in options.items() if value is not None}
    with progress_bar("compare", wanted=not quiet) as progress:
        found = compare(a, b, progress=progress, **given)
    if as_json:
        show_json(found.to_dict())
    elif quiet:
        show(_line(found))
    else:
        _show(found, verbose)


def _show(found: Comparison, verbose: bool) -> None:
    for line in found.notes:
        note(f"Note: {line}")
    measured = found.output_error is not None
    if verbose:
        rows = [_site_row(site) for site in sorted(found.sites, key=_badness, reverse=True)]
        header = ["module", "rank A", "rank B", "|dW_A|", "|dW_B|", "weight error", "output error"]
    else:
        rows = [_role_row(role) for role in _by_role(found.sites)]
        header = ["role", "layers", "rank A", "rank B", "weight error", "output error"]
    kept = [index for index, title in enumerate(header) if measured or title != "output error"]
    show(table([header[i] for i in kept], [[row[i] for i in kept] for row in rows], right=range(1, len(kept))))
    show("\n" + summary(_facts(found)))
    if found.latency is not None:
        show(f"\n{_cost_table(found.latency)}\n\n{NOT_FASTER}")


def _facts(found: Comparison) -> list[tuple[str, str]]:
    lines = [
        ("A", _adapter(found.adapter_a)),
        ("B", _adapter(found.adapter_b)),
        ("size", f"A / B is {found.ratio:.3g}"),
        ("weight error", _share(found.weight_error)),
    ]
    if found.carried:
        lines.insert(3, ("brought whole", _carried(found)))
    if found.items:
        lines.append(("output error", _share(found.output_error)))
        lines += [*_answers(found), ("data", f"{found.items:,} {found.unit}s on {found.model_class}")]
    if found.out:
        lines.append(("picture", found.out))
    return [*lines, ("time", f"{found.seconds:.2f} s on {found.device}")]


def _answers(found: Comparison) -> list[tuple[str, str]]:
    lines = []
    if found.kl is not None and found.agreement is not None:
        lines.append(("KL(A || B)", f"{found.kl:.3g} nats for each {found.unit}"))
        lines.append(("agreement", f"{found.agreement:.2%} of the {found.unit}s"))
    if found.squared_error is not None:
        lines.append(("squared error", f"{found.squared_error:.3g} between the outputs of A and B, mean"))
    if found.cosine is not None:
        text = f"{found.cosine:.6f} (a loss of {found.cosine_loss:.2e}) between the embeddings (mean over tokens)"
        lines.append(("cosine", f"{text} of A and B, mean"))
    if found.scores is not None:
        scores = found.scores
        base = "" if scores.base is None else f", the base {_score(scores.name, scores.base)}"
        text = f"A {_score(scores.name, scores.a)}, B {_score(scores.name, scores.b)}{base}"
        lines.append((scores.name if scores.name != "squared error" else "against labels", text))
    return lines


def _score(name: str, value: float) -> str:
    return f"{value:.2%}" if name == "accuracy" else f"{value:.4g}"


def _adapter(side: ComparedAdapter) -> str:
    rank = f", rank {_range(side.ranks)}" if side.ranks else ""
    layers = f"{side.modules:,} layers{rank}, {side.parameters:,} parameters"
    return f"{side.name}: {side.peft_type}, {layers}, {human_bytes(side.bytes)}"


def _carried(found: Comparison) -> str:
    parts = []
    for state in dict.fromkeys(each.state for each in found.carried):
        group = [each for each in found.carried if each.state == state]
        far = max((each.difference for each in group if each.difference is not None), default=None)
        text = f"{listing((each.name for each in group), 3)} {state}"
        parts.append(f"{text} (up to {_share(far)})" if state == "differs" and far is not None else text)
    return "; ".join(parts)


def _by_role(sites: list[ComparedSite]) -> list[list[ComparedSite]]:
    groups: dict[str, list[ComparedSite]] = {}
    for site in sites:
        groups.setdefault(site.role, []).append(site)
    return list(groups.values())


def _role_row(group: list[ComparedSite]) -> list[str]:
    return [
        group[0].role,
        str(len(group)),
        _range([site.rank_a for site in group if site.rank_a is not None]),
        _range([site.rank_b for site in group if site.rank_b is not None]),
        _shares(site.weight_error for site in group),
        _shares(site.output_error for site in group),
    ]


def _site_row(site: ComparedSite) -> list[str]:
    return [
        site.module,
        "-" if site.rank_a is None else str(site.rank_a),
        "-" if site.rank_b is None else str(site.rank_b),
        f"{site.norm_a:.4g}",
        f"{site.norm_b:.4g}",
        _share(site.weight_error),
        _share(site.output_error),
    ]


def _badness(site: ComparedSite) -> float:
    """What layers are sorted by: the error of the output where it is known, else of the weight; first what A lacks."""
    error = site.output_error if site.output_error is not None else site.weight_error
    return math.inf if error is None else error


def _cost_table(costs: Costs) -> str:
    rows = [
        [name, f"{1e6 * cost.one:,.0f}", f"{1e6 * cost.batch:,.0f}", sign + human_bytes(cost.bytes)]
        for name, cost, sign in (("base", costs.base, ""), ("A", costs.a, "+"), ("B", costs.b, "+"))
    ]
    header = ["form", f"µs / {costs.unit}, batch of 1", f"batch of {costs.batch_size}", "in memory"]
    return table(header, rows, right=(1, 2, 3))


def _line(found: Comparison) -> str:
    """The overall figures in one line."""
    parts = [f"weight error {_share(found.weight_error)}"]
    if found.output_error is not None:
        parts.append(f"output error {_share(found.output_error)}")
    if found.kl is not None and found.agreement is not None:
        parts.append(f"KL {found.kl:.3g}, agreement {found.agreement:.2%}")
    return ", ".join(parts)


def _range(values: list[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _shares(values: Iterable[float | None]) -> str:
    """The smallest and largest error of a role; layers that only B changes have none."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = _share(min(known)), _share(max(known))
    return low if low == high else f"{low} to {high}"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if value >= 1e-3 or value == 0 else f"{value:.1e}"
