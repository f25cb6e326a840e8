"""`surgery.push`: an adapter folder onto the Hub."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.publishing.card import make_card, method_of, own_text
from surgery.publishing.checks import Checked, check_adapter, valid_id
from surgery.publishing.package import PICTURE_NAME, PlannedFile, own_picture, package, refuse_private_files
from surgery.publishing.picture import draw_layers
from surgery.publishing.private import quiet_logs
from surgery.publishing.report import PushedFile, PushReport
from surgery.publishing.upload import Published, Target, Upload
from surgery.system.progress import Progress

__all__ = ["push"]


def push(
    folder: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    license: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    planned: Callable[[PushReport], None] | None = None,
) -> PushReport:
    """Publish an adapter folder on the Hugging Face Hub, as one commit.

    The folder is checked first and not changed. What is published has a model card, the base model's Hub id in place of
    a path, and no paths or tokens. Equal content makes no new commit. `HF_ENDPOINT`, `HF_TOKEN` and the stored login
    are honoured.

    Args:
        folder: the adapter's folder.
        repo: `ORG/NAME`; made where there is none.
        base_model: the base model's Hub id, `ORG/NAME` or `ORG/NAME@REVISION`, in place of what the adapter names.
        private: make a new repository private.
        revision: the branch to commit to, made where there is none.
        create_pr: open a pull request instead of committing.
        commit_message: its title.
        license: the Hub's name of the adapter's licence, for the card.
        token: in place of `HF_TOKEN` and the stored login.
        dry_run: check and plan; no connection is opened.
        progress: called with bytes sent, bytes in all and a file's name.
        planned: called with the plan, before anything is sent.

    Returns:
        What was done, or would be.

    Raises:
        AdapterError: the folder is incomplete, or its tensors are not finite or not those of its configuration.
        HubError: the base model is no Hub id, a text holds a token or a path, or the Hub refuses or cannot be reached.
    """
    started = time.perf_counter()
    valid_id(repo)
    checked = check_adapter(Path(folder), base_model)
    with tempfile.TemporaryDirectory(prefix="surgery-") as scratch:
        plan = _Plan(checked, repo, revision, license, Path(scratch))
        plan.make(checked.card)
        if planned is not None:
            planned(plan.report(None, private or None))
        published = None
        if not dry_run:
            message = commit_message or f"{method_of(checked)[0]} adapter for {checked.base}"
            target = Target(repo, revision, create_pr, private, message, token)
            with quiet_logs(token), Upload(target).open() as upload:
                plan.meet(upload)
                published = upload.commit(plan.files, progress)
    report = plan.report(published, private or None)
    report.dry_run, report.seconds = dry_run, time.perf_counter() - started
    return report


@dataclass
class _Plan:
    """The card and the files of a push."""

    checked: Checked
    repo: str
    revision: str | None
    license: str | None
    scratch: Path

    def __post_init__(self) -> None:
        self.notes = list(self.checked.notes)
        self.picture, self.drawn = own_picture(self.checked.folder), None
        if self.picture is None:
            path = self.scratch / PICTURE_NAME
            try:
                self.drawn = path if draw_layers(self.checked, self.repo, path) else None
            except SurgeryError as error:
                self.notes.append(f"no picture: {error}")
            self.picture = PICTURE_NAME if self.drawn is not None else None
        self.card = ""
        self.files: list[PlannedFile] = []
        self.left_out: list[str] = []

    def make(self, existing: str | None) -> None:
        """Write the card, keeping what is somebody's in `existing`, and list the files."""
        self.card = make_card(self.checked, self.repo, self.revision, self.license, self.picture, existing)
        self.files, self.left_out = package(self.checked, self.card, self.drawn)
        refuse_private_files(self.files, self.checked.folder)

    def meet(self, upload: Upload) -> None:
        """Take over what the repository's card says, where the folder has none of its own."""
        there = upload.card()
        mine, theirs = own_text(self.checked.card), own_text(there)
        if not mine and theirs:
            self.make(there)
        elif mine and theirs and theirs not in self.card:
            self.notes.append("the repository's card has other text; the folder's card takes its place")
        if not upload.base_is_there(self.checked.base):
            self.notes.append(f"the Hub shows no model {self.checked.base} to {upload.user}: is that its name?")

    def report(self, published: Published | None, private: bool | None) -> PushReport:
        """The plan, and what came of it."""
        checked = self.checked
        report = PushReport(
            out=None,
            repo=self.repo,
            revision=self.revision,
            peft_type=checked.peft_type,
            title=method_of(checked)[0],
            modules=checked.modules,
            trainable_parameters=checked.parameters,
            bytes=checked.bytes,
            seconds=0.0,
            base=f"{checked.base}@{checked.revision}" if checked.revision else checked.base,
            files=[PushedFile(file.path, file.size) for file in self.files],
            left_out=self.left_out,
            card=self.card,
            private=private,
            notes=list(self.notes),
        )
        if published is not None:
            report.private = published.private
            report.out, report.created, report.unchanged = published.url, published.created, published.unchanged
            report.commit, report.commit_url = published.commit, published.commit_url
            report.pr_url = published.pr_url
        return report
