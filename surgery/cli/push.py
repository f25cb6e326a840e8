"""`surgery push`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import common_options, set_verbosity
from surgery.cli.output import note, progress_bar, show, show_json, summary, table
from surgery.errors import listing
from surgery.system.text import human_bytes

if TYPE_CHECKING:
    from surgery.publishing.report import PushReport


@click.command("push")
@click.argument("folder")
@click.argument("repo", metavar="ORG/NAME")
@click.option(
    "--base-model",
    metavar="ORG/NAME",
    help="Hub id of the base model. [default: what the adapter names, where it is one]",
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to, made where there is none. [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--commit-message", metavar="TEXT", help="Title of the commit.")
@click.option("--license", metavar="ID", help="The adapter's licence, as the Hub calls it; for the card.")
@click.option(
    "--token",
    metavar="TOKEN",
    help="Hub token; - reads it from standard input. [default: HF_TOKEN, or the stored login]",
)
@click.option("--dry-run", is_flag=True, help="Check everything, show files and card; no connection is opened.")
@common_options()
def command(
    folder: str, repo: str, token: str | None, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    """Publish an adapter on the Hugging Face Hub.

    FOLDER is checked first and not changed. ORG/NAME gets it as one commit, with a model card; a card of your own is
    kept, and ours stands in it between two markers. Paths of this machine and tokens are not published. Nothing is
    committed where the Hub has it all already.

    \b
    Examples:
      surgery push small/ org/small --base-model org/base
      surgery push small/ org/small --private --dry-run
    """
    token = _taken(token)
    set_verbosity(verbose, quiet)
    from surgery.publishing.push import push

    shown = not quiet and not as_json
    dry_run = options["dry_run"]
    plan: list[PushReport] = []

    def planned(report: PushReport) -> None:
        plan.append(report)
        if shown:
            _show_plan(report, dry_run)

    with _progress(wanted=shown) as progress:
        report = push(folder, repo, token=token, progress=progress, planned=planned, **options)
    if as_json:
        show_json(report.to_dict())
        return
    if shown and not dry_run:
        _show_result(report, plan[0])
    show(report.out if report.out is not None else human_bytes(sum(file.bytes for file in report.files)))


def _show_plan(report: PushReport, dry_run: bool) -> None:
    """The plan: on stderr, since stdout gets the address alone; of a dry run it is the result, with the card."""
    for line in report.notes:
        note(f"Note: {line}")
    if report.left_out:
        note(f"Note: not published: {listing(report.left_out, 6)}")
    lines = [
        ("adapter", f"{report.title}, PEFT type {report.peft_type}, {report.modules:,} layers"),
        ("base", report.base),
        ("to", f"{report.repo}, branch {report.revision or 'main'}{', private' if report.private else ''}"),
    ]
    if dry_run:
        lines.append(("dry run", "nothing sent"))
    files = [[file.path, human_bytes(file.bytes)] for file in report.files]
    files.append([f"total, {len(files)} files", human_bytes(sum(file.bytes for file in report.files))])
    show(f"{summary(lines)}\n\n{table(['file', 'size'], files, right=(1,))}\n", err=not dry_run)
    if dry_run:
        show("README.md:\n")
        show("\n".join(f"  {line}".rstrip() for line in report.card.splitlines()) + "\n")


def _show_result(report: PushReport, plan: PushReport) -> None:
    """What came of the plan, on stderr."""
    for line in report.notes[len(plan.notes) :]:
        note(f"Note: {line}")
    if report.card != plan.card:
        note("Note: the text of the card that is on the Hub was kept")
    if report.unchanged:
        note("The Hub has all of it already: no commit was made.")
    else:
        made = "a new " if report.created else "a "
        kind = f"{made}{'private' if report.private else 'public'} repository"
        note(f"Commit {report.commit} in {kind}, in {report.seconds:.1f} s.")


def _taken(token: str | None) -> str | None:
    """Return the token of `--token`; `-` reads it from standard input."""
    if token is None:
        return None
    if token == "-":
        return sys.stdin.readline().strip() or None
    note(
        "Warning: --token leaves the token in the shell's history and shows it in the list of processes; --token - "
        "(standard input), HF_TOKEN and `hf auth login` do not"
    )
    return token


@contextlib.contextmanager
def _progress(wanted: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar of bytes on a terminal, a line now and then without one; by Xet the Hub's client shows bars of its own."""
    from huggingface_hub import utils

    with progress_bar("push", wanted, unit="B") as move:
        shown = not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
        if wanted and sys.stderr.isatty():
            yield move
            return
        utils.disable_progress_bars()  # type: ignore[attr-defined]
        try:
            yield move
        finally:
            if shown:
                utils.enable_progress_bars()  # type: ignore[attr-defined]
