"""One commit to a repository on the Hub: who, where, whether it is there already, and again where the network fails."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

from surgery.errors import HubError
from surgery.publishing.package import PlannedFile
from surgery.system.progress import Progress
from surgery.system.redaction import redacted

__all__ = ["Progress", "Published", "Target", "Upload"]

T = TypeVar("T")

ATTEMPTS = 5
LONGEST_WAIT = 60.0
BUSY = frozenset({408, 429, 500, 502, 503, 504})
# What the client's HTTP library raises; which library that is depends on the client's version.
HTTP_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


@dataclass(frozen=True)
class Target:
    """Where to, and how.

    Attributes:
        repo: `ORG/NAME`.
        revision: a branch, made where it is missing; None for the main one.
        create_pr: open a pull request.
        private: make a new repository private.
        message: of the commit.
        token: None for `HF_TOKEN` or the stored login.
    """

    repo: str
    revision: str | None
    create_pr: bool
    private: bool
    message: str
    token: str | None


@dataclass
class Published:
    """What came of it; the fields are those of `PushReport`."""

    url: str
    private: bool
    created: bool
    unchanged: bool
    commit: str
    commit_url: str
    pr_url: str | None


class Upload:
    """A push in the making.

    `open` finds or makes the repository; `commit` sends everything as one commit on top of what `open` found, or not at
    all; leaving the block after a failure removes a repository or branch that `open` made, unless somebody used it.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """

    def __init__(self, target: Target) -> None:
        if constants.is_offline_mode():
            raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; --dry-run shows what would be")
        self.target = target
        self.api = HfApi(token=target.token, library_name="adapter-surgery")
        self.user = ""
        self.head = ""
        self.is_private = target.private
        self.made_repo = False
        self.made_branch = False

    @contextlib.contextmanager
    def open(self) -> Iterator[Upload]:
        """Find the repository and the branch, or make them."""
        try:
            self._find()
            yield self
        except BaseException:
            self._undo()
            raise

    # Where to

    def _find(self) -> None:
        target = self.target
        try:
            self.user = str(self._asked(lambda: self.api.whoami(token=target.token))["name"])
        except LocalTokenNotFoundError:
            raise HubError("no Hub token: log in with `hf auth login`, or set HF_TOKEN") from None
        info = self._info(None)
        if info is None:
            if target.create_pr:
                raise HubError(f"{target.repo}: no such repository to open a pull request in; push without --create-pr")
            self._asked(self._make_repo)
            info = self._info(None)
            if info is None:
                raise HubError(f"{target.repo}: is taken, and {self.user} cannot see it")
        if target.private and not info.private:
            raise HubError(
                f"{target.repo}: is there already, and public; --private is for new repositories: change that on the "
                "Hub, or push without --private"
            )
        self.is_private = bool(info.private)
        self.head = str(info.sha)
        if target.revision is not None:
            self._find_branch(target.revision)

    def _find_branch(self, branch: str) -> None:
        info = self._info(branch)
        if info is None:
            if self.target.create_pr:
                raise HubError(f"{self.target.repo}: no branch {branch} to open a pull request against")
            self._asked(lambda: self.api.create_branch(self.target.repo, branch=branch, exist_ok=True))
            self.made_branch = True
            info = self._info(branch)
        if info is not None:
            self.head = str(info.sha)

    def _info(self, revision: str | None) -> Any:
        """The repository, or None where there is none, or not this revision of it."""
        try:
            return self._asked(lambda: self.api.repo_info(self.target.repo, revision=revision))
        except (RevisionNotFoundError, RepositoryNotFoundError):
            return None

    def _make_repo(self) -> None:
        try:
            self.api.create_repo(self.target.repo, private=self.target.private or None, exist_ok=False)
            self.made_repo = True
        except HfHubHTTPError as error:
            if _status(error) != 409:  # there by now: somebody else's, or ours, and the answer was lost
                raise

    def _undo(self) -> None:
        """Leave the Hub as it was: what this push made and nobody wrote to goes."""
        with contextlib.suppress(Exception):  # what failed already is what the user must hear of
            if self.made_repo:
                if self.api.repo_info(self.target.repo).sha == self.head or not self.head:
                    self.api.delete_repo(self.target.repo)
            elif self.made_branch and self.target.revision is not None:
                found = self.api.repo_info(self.target.repo, revision=self.target.revision)
                if found.sha == self.head:
                    self.api.delete_branch(self.target.repo, branch=self.target.revision)

    # What is there

    def card(self) -> str | None:
        """The `README.md` that the repository has, or None."""
        with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
            try:
                path = self._asked(
                    lambda: self.api.hf_hub_download(
                        self.target.repo, "README.md", revision=self.head, local_dir=folder
                    )
                )
            except EntryNotFoundError:
                return None
            return Path(path).read_text(encoding="utf-8", errors="replace")

    def base_is_there(self, base: str) -> bool:
        """Whether the Hub has the base model, as far as this account can see; a failure to say so is no failure."""
        try:
            self.api.model_info(base)
        except RepositoryNotFoundError:
            return False
        except (HTTP_ERROR, OSError, ValueError):
            return True
        return True

    # The commit

    def commit(self, files: Sequence[PlannedFile], progress: Progress | None = None) -> Published:
        """Send the files as one commit.

        A file that the Hub has already is not sent again, and where it has all of them, no commit is made. So the whole
        may be repeated after a lost answer; only of a pull request it is not known whether it was opened.
        """
        target = self.target
        paths = self._has_xet()

        def send() -> Any:
            with contextlib.ExitStack() as stack:
                sent = _Sent(sum(file.size for file in files), progress)
                return self.api.create_commit(
                    target.repo,
                    [_operation(file, paths, stack, sent) for file in files],
                    commit_message=target.message,
                    revision=target.revision,
                    create_pr=target.create_pr,
                    parent_commit=self.head,
                )

        info = self._asked(send, again=_once_more_pr if target.create_pr else _once_more)
        unchanged = info.oid == self.head
        address = f"{self.api.endpoint}/{target.repo}"
        if target.revision is not None:
            address += f"/tree/{quote(target.revision, safe='')}"
        return Published(
            url=redacted(info.pr_url or address, target.token),
            private=self.is_private,
            created=self.made_repo,
            unchanged=unchanged,
            commit=info.oid,
            commit_url=redacted(info.commit_url, target.token),
            pr_url=info.pr_url,
        )

    def _has_xet(self) -> bool:
        """Whether large files go by Xet. The client does not fall back to LFS where a server has no Xet: we ask."""
        if constants.HF_HUB_DISABLE_XET:
            return True  # the client itself takes the other road
        revision = quote(self.target.revision or "main", safe="")
        address = f"{self.api.endpoint}/api/models/{self.target.repo}/xet-write-token/{revision}"
        headers = build_hf_headers(token=self.target.token)
        query = {"create_pr": "1"} if self.target.create_pr else None
        try:
            status = get_session().get(address, headers=headers, params=query).status_code
        except HTTP_ERROR:
            return False
        return bool(status == 200)

    # Asking, and asking again

    def _asked(self, call: Callable[[], T], again: Callable[[BaseException], float | None] | None = None) -> T:
        """Call, and again while the failure may pass.

        Raises:
            HubError: it did not pass.
        """
        again = again or _once_more
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except (HTTP_ERROR, OSError, RuntimeError, ValueError) as error:
                cause = _cause(error)
                if isinstance(cause, (LocalTokenNotFoundError, EntryNotFoundError)):
                    raise cause from None
                if isinstance(cause, (RepositoryNotFoundError, RevisionNotFoundError)) and self.user:
                    raise cause from None
                wait = again(cause)
                if wait is None or attempt == ATTEMPTS - 1:
                    raise self._explained(cause) from None
                time.sleep(min(max(wait, 2.0**attempt), LONGEST_WAIT))
        raise AssertionError("unreachable")

    def _explained(self, error: BaseException) -> HubError:
        repo, status, who = self.target.repo, _status(error), self.user or "this account"
        if status is None and isinstance(error, (HTTP_ERROR, ConnectionError)):
            return self._unreachable(error)
        if isinstance(error, json.JSONDecodeError):
            return HubError(f"{repo}: the Hub's answer cannot be read; nothing was pushed, push again later")
        said = redacted(" ".join(str(getattr(error, "server_message", None) or "").split()), self.target.token)
        reasons = {
            None: redacted(" ".join(str(error).split()), self.target.token),
            401: "the Hub does not accept the token; log in with `hf auth login`, or set HF_TOKEN",
            403: f"{who} may not write there ({said or 'forbidden'})",
            412: "has changed while this push ran; nothing was pushed, push again",
            429: "the Hub asks to slow down (429); nothing was pushed, push again later",
        }
        other = f"the Hub answers {status}{f' ({said})' if said else ''}; nothing was pushed"
        return HubError(f"{repo}: {reasons.get(status, other)}")

    def _unreachable(self, error: BaseException) -> HubError:
        repo, endpoint = self.target.repo, redacted(self.api.endpoint)
        what = f"{repo}: the connection to {endpoint} failed ({type(error).__name__})"
        if self.target.create_pr and "/commit/" in _address(error):
            where = f"{endpoint}/{repo}/discussions"
            return HubError(f"{what} while the pull request was opened; see {where} whether it is there")
        return HubError(f"{what}; nothing was pushed, push again")


class _Sent:
    """Adds up what was sent of all files."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.places = total, progress, dict[str, int]()

    def tell(self, path: str, place: int) -> None:
        """One file was sent up to there; a part that is sent again does not count twice."""
        self.places[path] = max(place, self.places.get(path, 0))
        if self.progress is not None:
            self.progress(sum(self.places.values()), self.total, path)


class _Reader(io.BufferedReader):
    """A file that tells how far it was sent, once `sent` is set."""

    name_in_repo = ""
    sent: _Sent | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, and tell."""
        piece = super().read(size)
        if self.sent is not None:
            self.sent.tell(self.name_in_repo, self.tell())
        return piece


def _operation(file: PlannedFile, by_path: bool, stack: contextlib.ExitStack, sent: _Sent) -> CommitOperationAdd:
    """A file as the client takes it: by its path, or opened, which makes the client send it by LFS."""
    if by_path or isinstance(file.source, bytes):
        return CommitOperationAdd(file.path, file.source)
    reader = stack.enter_context(_Reader(file.source.open("rb", buffering=0)))
    operation = CommitOperationAdd(file.path, reader)  # reads it once, for its digest
    reader.name_in_repo, reader.sent = file.path, sent
    return operation


def _cause(error: BaseException) -> BaseException:
    """The client wraps what goes wrong with a large file."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _address(error: BaseException) -> str:
    try:
        return str(getattr(error, "request").url)  # noqa: B009
    except (AttributeError, RuntimeError):
        return ""


def _once_more(error: BaseException) -> float | None:
    """How long to wait before asking again; None where that would not help, or the client has asked often enough."""
    if any(part in _address(error) for part in ("/preupload/", "/objects/batch", "/store/", "/resolve/")):
        return None
    status = _status(error)
    if isinstance(error, json.JSONDecodeError):  # a page for people, as servers in trouble send it
        return 1.0
    if status is None:
        return 1.0 if isinstance(error, HTTP_ERROR) and not isinstance(error, HfHubHTTPError) else None
    if status not in BUSY:
        return None
    after = getattr(error, "response").headers.get("Retry-After", "")  # noqa: B009
    return float(after) if after.isdigit() else 1.0


def _once_more_pr(error: BaseException) -> float | None:
    """As `_once_more`, but what may have opened a pull request is not repeated."""
    lost = isinstance(error, json.JSONDecodeError) or (_status(error) is None and "/commit/" in _address(error))
    return None if lost else _once_more(error)
