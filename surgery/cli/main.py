"""The command group, and how errors and interruptions end the program."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from surgery.cli import streams
from surgery.cli.output import printable, show_json
from surgery.errors import SurgeryError
from surgery.system.redaction import redacted
from surgery.version import __version__

__all__ = ["INTERRUPTED", "TERMINATED", "Stopped", "cli", "main"]

COMMANDS = {
    "blend": "surgery.cli.blend",
    "compare": "surgery.cli.compare",
    "convert": "surgery.cli.convert",
    "export": "surgery.cli.export",
    "init": "surgery.cli.init",
    "inspect": "surgery.cli.inspect",
    "merge": "surgery.cli.merge",
    "methods": "surgery.cli.methods",
    "push": "surgery.cli.push",
    "train": "surgery.cli.train",
}
INTERRUPTED, TERMINATED = 130, 143
LONGEST_MESSAGE = 2000


class Stopped(click.ClickException):
    """A command that was interrupted and says itself what it leaves behind."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = exit_code

    def show(self, file: Any = None) -> None:
        """Print the message."""
        streams.write(self.message, err=True)


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

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; with `--json` a failure is a JSON object on stdout, too, whatever kind of failure it is."""
        words = list(sys.argv[1:] if args is None else args)
        try:
            # Not click's own standalone mode: it would print a failure before it is known here.
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            _report_failure(words, error.message)
            _end(error, standalone_mode)
        except click.Abort as ending:
            _report_failure(words, f"Interrupted; {_left(ending.__cause__)}")
            _end(ending, standalone_mode)
        except _Terminated as ending:
            _report_failure(words, f"Terminated; {_left(ending)}")
            raise
        except Exception as error:  # a fault of ours: it keeps its traceback
            _report_failure(words, f"internal error: {type(error).__name__}: {error}")
            raise
        if standalone_mode:
            sys.exit(result if isinstance(result, int) else 0)
        return result

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse the words; a help text that cannot be printed is a named error."""
        try:
            return super().make_context(*args, **options)
        except OSError as error:
            raise _printing_failed(error) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            raise _printing_failed(error) from None
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


def _printing_failed(error: OSError) -> Exception:
    """Return the named error where it was click's own printing (a help text) that failed, else the error itself."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code is click.echo.__code__:
            streams.drop(streams.STDOUT)
            return streams.StreamLost(error)
        frame = frame.tb_next
    return error


def _report_failure(words: Sequence[str], message: str) -> None:
    """Print a failure as JSON where `--json` was given; not where it is stdout itself that failed."""
    options = words[: words.index("--")] if "--" in words else words
    if "--json" not in options:
        return
    command = next((word for word in words if word in COMMANDS), None)
    with contextlib.suppress(streams.StreamLost):
        show_json({"command": command, "error": redacted(message)})


def _end(ending: click.ClickException | click.Abort, standalone: bool) -> NoReturn:
    """Raise what ended the command, or, where the program is to end here, print it and exit."""
    if not standalone:
        raise ending
    if isinstance(ending, click.Abort):
        streams.write("Aborted!", err=True)
        sys.exit(1)
    _show(ending)
    sys.exit(ending.exit_code)


def _show(error: click.ClickException) -> None:
    try:
        error.show()
    except OSError:
        streams.drop(streams.STDERR)


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
    streams.open_missing()
    signal.signal(signal.SIGTERM, _terminate)
    code = _exit_code()
    sys.exit(1 if code == 0 and streams.stderr_was_lost() else code)


def _exit_code() -> int:
    """Run the command and return its exit code."""
    try:
        result = cli.main(prog_name="surgery", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except _Terminated as ending:
        streams.write(f"Terminated; {_left(ending)}", err=True)
        return TERMINATED
    except click.Abort as ending:
        streams.write(f"Interrupted; {_left(ending.__cause__)}", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        _show(error)
        return error.exit_code
    return result if isinstance(result, int) else 0
