"""The command group, and how errors and interruptions end the program."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
from types import FrameType
from typing import Any

import click

from surgery.cli.output import printable
from surgery.errors import SurgeryError
from surgery.system.redaction import redacted
from surgery.version import __version__

__all__ = ["cli", "main"]

COMMANDS = {
    "compare": "surgery.cli.compare",
    "convert": "surgery.cli.convert",
    "init": "surgery.cli.init",
    "inspect": "surgery.cli.inspect",
    "merge": "surgery.cli.merge",
    "methods": "surgery.cli.methods",
    "push": "surgery.cli.push",
    "train": "surgery.cli.train",
}
INTERRUPTED, TERMINATED = 130, 143
LONGEST_MESSAGE = 2000


class LazyGroup(click.Group):
    """Imports a command's module only when it is needed, and turns named errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if near and near[0] != args[0] and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}; did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            if error.told:  # by another of torchrun's processes
                raise click.exceptions.Exit(1) from None
            # One line, whatever a library put into the message, or a file into its names.
            message = redacted(printable(" ".join(str(error).split())))
            raise click.ClickException(_shortened(message)) from None
        except click.ClickException as error:
            vars(error)["message"] = redacted(error.message)  # click repeats what was typed, a token too
            raise
        except (MemoryError, RuntimeError) as error:
            wanting = any(words in str(error) for words in ("allocate memory", "out of memory"))
            if isinstance(error, RuntimeError) and not wanting:
                raise
            raise click.ClickException("not enough memory for these options; nothing was written") from None


def _shortened(message: str) -> str:
    if len(message) <= LONGEST_MESSAGE:
        return message
    half = LONGEST_MESSAGE // 2
    return f"{message[:half]} ... {message[-half:]}"


def _versions(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    click.echo(f"surgery {__version__}")
    for package in ("torch", "transformers", "peft", "safetensors", "huggingface-hub"):
        try:
            click.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            click.echo(f"{package} is not installed")
    click.echo(f"python {sys.version.split()[0]}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, callback=_versions, expose_value=False, is_eager=True, help="Show versions.")
def cli() -> None:
    """Model surgery and adapter compression.

    Make adapters that start well from any base model, bring trained ones into smaller forms, and say what that costs.
    All of them open with PEFT.

    \b
    Examples:
      surgery init --method frod model/
      surgery convert lora/ --to giva --base model/ --data texts.jsonl
    """


class _Terminated(BaseException):
    """SIGTERM arrived; outputs in the making are cleaned up on its way."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


def _left(ending: BaseException | None) -> str:
    """What an interrupted command leaves behind: what the interruption was given to say, or nothing."""
    return "; ".join(getattr(ending, "__notes__", ())) or "nothing was written."


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli.main(prog_name="surgery", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except _Terminated as ending:
        click.echo(f"Terminated; {_left(ending)}", err=True)
        sys.exit(TERMINATED)
    except click.Abort as ending:
        click.echo(f"Interrupted; {_left(ending.__cause__)}", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
