"""What a push did, or would do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["PushReport", "PushedFile"]


@dataclass
class PushedFile:
    """One file of a push: its name in the repository, and its bytes."""

    path: str
    bytes: int


@dataclass
class PushReport:
    """The result of `surgery.push`, with the keys of its `--json` output.

    Attributes:
        out: where the adapter is on the Hub; None for a dry run. Of a pull request its address.
        repo: the repository's id.
        revision: the branch, or None for the main one.
        peft_type: PEFT type of the adapter.
        title: its method.
        modules: number of layers that it changes.
        trainable_parameters: numbers that a trainer would train, heads included.
        bytes: size of `adapter_model.safetensors`.
        seconds: time from opening the folder to the answer of the Hub.
        base: the base model's Hub id.
        files: what is pushed.
        left_out: what in the folder is not.
        card: the text of `README.md`.
        private: the repository is private; of one that is there already, None in a dry run.
        created: the repository was made by this push.
        unchanged: the Hub had all of it already; no commit was made.
        commit: name of the commit.
        commit_url: its address.
        pr_url: address of the pull request.
        dry_run: nothing was sent.
        notes: what the user should know.
        command: the command.
    """

    out: str | None
    repo: str
    revision: str | None
    peft_type: str
    title: str
    modules: int
    trainable_parameters: int
    bytes: int
    seconds: float
    base: str
    files: list[PushedFile]
    left_out: list[str]
    card: str
    private: bool | None = None
    created: bool = False
    unchanged: bool = False
    commit: str | None = None
    commit_url: str | None = None
    pr_url: str | None = None
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)
    command: str = "push"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)
