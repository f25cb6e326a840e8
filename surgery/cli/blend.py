"""`surgery blend`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from surgery.blending.naming import parsed_member
from surgery.cli.convert import making_options, result_lines
from surgery.cli.options import check_early, common_options, set_verbosity
from surgery.cli.output import note, progress_bar, show, show_json, summary, table, written
from surgery.converters.forms import BUDGETS, FORMS
from surgery.storage.hub_cache import check_names

if TYPE_CHECKING:
    from surgery.blending.report import BlendReport

# The keys of surgery.blending.combinations.COMBINATIONS, which brings torch.
HOW = ("sum", "ties", "dare", "dare-ties")


@click.command("blend")
@click.argument("members", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option("-o", "--out", metavar="OUT", default="blend", show_default=True, help="Folder to write.")
@click.option("--to", type=click.Choice(FORMS.names()), default="lora", show_default=True, help="Form of the result.")
@click.option(
    "--how",
    type=click.Choice(HOW),
    default="sum",
    show_default=True,
    help="sum is exact; the others drop entries of each member (arXiv 2306.01708, 2311.03099).",
)
@click.option("--density", type=float, metavar="D", help="ties, dare: share of entries that is kept.  [default: 0.5]")
@click.option("--head", metavar="ADAPTER", help="Member whose heads, biases and embeddings are taken.")
@click.option("--repeated", is_flag=True, help="Allow the same adapter twice.")
@click.option("--base", metavar="MODEL", help="Their base model: a folder or a Hub id.")
@making_options()
@common_options()
def command(
    members: tuple[str, ...], out: str, to: str, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    """Add adapters of one base up, each with its weight.

    The sum is exact, of any types that are read. A budget cuts it as surgery convert does; with --base and --data in
    what it does to the model's answers. For each member the table says how much of it remains.

    \b
    Examples:
      surgery blend style/=0.7 subject/=0.5 -o both/
      surgery blend a/ b/ --how ties --density 0.3 --rank 32
      surgery blend a/ b/ --to giva --ratio 40 --base model/ --data texts.jsonl
    """
    given = [name for name in BUDGETS if options[name] is not None]
    if len(given) > 1:
        raise click.UsageError("give one of " + ", ".join(f"--{name.replace('_', '-')}" for name in given))
    check_early(out, options["force"], options["rank"])
    check_names(*(parsed_member(member)[0] for member in members), *filter(None, [options["base"]]))
    set_verbosity(verbose, quiet)
    from surgery.blending.blend import blend

    own = {option.name for form in FORMS for option in form.options} - {"bits", "basis", "per_layer_ranks", "variant"}
    options["form_options"] = {name: options.pop(name) for name in own}
    with progress_bar("blend", wanted=not quiet and not as_json) as progress:
        _, report = blend(list(members), out, to, progress=progress, **options)
    if as_json:
        show_json(report.to_dict())
    elif quiet:
        show(written(report.converted.out, report.converted.bytes))
    else:
        _show(report)


def _show(report: BlendReport) -> None:
    for line in (*report.notes, *report.converted.notes):
        note(f"Note: {line}")
    rows = [
        [each.adapter, each.peft_type, f"{each.weight:g}", f"{each.modules:,}", f"{each.remains:.1%}",
         f"{each.cosine:.3f}"]
        for each in report.members
    ]  # fmt: skip
    show(table(["adapter", "type", "weight", "layers", "remains", "cosine"], rows, right=(2, 3, 4, 5)) + "\n")
    density = f", density {report.density:g}" if report.density is not None else ""
    show(summary([("blend", f"{report.how}{density}"), *result_lines(report.converted)[1:]]))
