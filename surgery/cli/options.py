"""Options that several commands share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from surgery.errors import OptionError
from surgery.methods.registry import method_info
from surgery.models.tasks import TASK_TABLE
from surgery.storage.output_paths import check_output

__all__ = [
    "chat_template_option",
    "check_early",
    "common_options",
    "compute_options",
    "layout_option",
    "output_options",
    "refuse_idle_options",
    "resume_option",
    "set_verbosity",
    "task_option",
]

F = TypeVar("F", bound=Callable[..., Any])


def _stack(options: list[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def common_options() -> Callable[[F], F]:
    """`--json`, `-q` and `-v`."""
    return _stack(
        [
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
            click.option("-q", "--quiet", is_flag=True, help="Print only the result, no notes and no progress."),
            click.option("-v", "--verbose", is_flag=True, help="Print what the libraries log, and a row per layer."),
        ]
    )


def output_options() -> Callable[[F], F]:
    """`-o`, `--dry-run` and `--overwrite`."""
    return _stack(
        [
            click.option("-o", "--out", metavar="OUT", help="Folder to write. [default: <model>-<method>]"),
            click.option("--dry-run", is_flag=True, help="Check everything and show the sizes; write nothing."),
            click.option("--overwrite", "--force", "force", is_flag=True, help="Replace OUT where it exists."),
        ]
    )


def resume_option() -> Callable[[F], F]:
    """`--resume/--no-resume`."""
    return click.option(
        "--resume/--no-resume",
        default=True,
        help="Use what a killed run of this command has left, or start again.  [default: resume]",
    )


def compute_options() -> Callable[[F], F]:
    """`--device`, `--dtype` and `--seed`."""
    return _stack(
        [
            click.option(
                "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda or cuda:N."
            ),
            click.option(
                "--dtype",
                type=click.Choice(["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]),
                default="float32",
                show_default=True,
                help="Type of the stored tensors; giva: also of the model while its gradient is computed.",
            ),
            click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random."),
        ]
    )


def chat_template_option() -> Callable[[F], F]:
    """`--chat-template`."""
    return click.option(
        "--chat-template", metavar="FILE", help="Chat template for messages in the data.  [default: the tokenizer's]"
    )


def layout_option() -> Callable[[F], F]:
    """`--layout`, of a LoRA on fused experts; the names stand in surgery.adapters.experts, which brings torch."""
    return click.option(
        "--layout",
        type=click.Choice(["peft", "unsloth"]),
        help="Order of the numbers of a LoRA on fused experts: PEFT's, or that of older Unsloth files. [default: peft]",
    )


def task_option(default: str = "config.json's") -> Callable[[F], F]:
    """`--task`; its values stand in the help, where they can be broken into lines."""
    return click.option(
        "--task",
        type=click.Choice(list(TASK_TABLE)),
        metavar="TASK",
        help=f"Which model class to open: {', '.join(TASK_TABLE)}.  [default: {default}]",
    )


def refuse_idle_options(method: str, flags: dict[str, str], given: dict[str, Any]) -> None:
    """An option that the chosen method would ignore is a usage error.

    Args:
        method: the method.
        flags: option name -> how it is written on the command line.
        given: option name -> value, None where it was not given.
    """
    taken = method_info(method).options
    for name, flag in flags.items():
        if given[name] is not None and name not in taken:
            others = ", ".join(sorted(flags[option] for option in taken if option in flags)) or "none of its own"
            raise click.UsageError(f"method {method} takes no {flag}; its options are: {others}")


def check_early(out: str, force: bool, rank: int | None = None) -> None:
    """Refuse an occupied output and a wrong rank before anything heavy is imported; the library does so again.

    Raises:
        OutputError: the output may not be written.
        OptionError: the rank is below 1.
    """
    if rank is not None and rank < 1:
        raise OptionError(f"rank must be a whole number of at least 1, got {rank}")
    check_output(Path(out), force)


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """Quieten the libraries unless `-v` was given: their advice is about calls that are ours, not the user's."""
    if quiet and verbose:
        raise click.UsageError("-q and -v exclude each other")
    if verbose:
        logging.basicConfig(level=logging.INFO)
        return
    import warnings

    import wrapt

    warnings.filterwarnings("ignore")
    # When it is imported, which takes seconds: what only looks at files does without it.
    wrapt.register_post_import_hook(_quieten, "transformers")


def _quieten(transformers: Any) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
