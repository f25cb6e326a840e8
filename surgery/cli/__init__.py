"""The `surgery` command. Nothing here imports torch before a command runs."""

from surgery.cli.main import main

__all__ = ["main"]
