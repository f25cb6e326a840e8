"""From what the user typed, a folder or a Hub id, to a local folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError
from surgery.system.redaction import redacted

__all__ = ["cached_files", "check_names", "local_folder"]

# `org/name`, a folder in it, and a revision. A bare name is taken for a folder: nearly always it is one.
HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<inside>[\w-][\w.-]*(?:/[\w-][\w.-]*)*))?/?(?:@(?P<revision>[\w./-]+))?"
)
WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]


def check_names(*names: str | None) -> None:
    """Refuse names that are neither a folder nor a Hub id, without a look at the Hub; None is passed over.

    Commands ask this of what they are given before they import what takes seconds.

    Raises:
        CheckpointError: one is.
    """
    for name in names:
        if name is not None:
            _folder_or_id(name)


def local_folder(name: str) -> Path:
    """The folder called `name`, or a local copy of the Hub repository called `name`, or of a folder in it.

    A folder on disk wins over a Hub id: `org/name`, `org/name@revision`, `org/name/sub/folder@revision`. `HF_HOME`,
    `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are honoured; what is in the cache is used where the Hub cannot be
    reached.

    Raises:
        CheckpointError: there is no such folder, and no such repository can be had.
    """
    found = _folder_or_id(name)
    if isinstance(found, Path):
        return found
    return _download(name, found["repo"], found["inside"], found["revision"])


def cached_files(name: str, files: Sequence[str]) -> dict[str, Path]:
    """Those files of a Hub repository that are in the local cache; the Hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    match = HUB_ID.fullmatch(name)
    if match is None or match["inside"] is not None:
        return {}
    found = {file: try_to_load_from_cache(match["repo"], file, revision=match["revision"]) for file in files}
    return {file: Path(path) for file, path in found.items() if isinstance(path, str)}


def _folder_or_id(name: str) -> Path | re.Match[str]:
    path = Path(name)
    try:
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{name}: is a file, expected a folder")
    except OSError as error:  # a name that no file system takes
        raise CheckpointError(f"{name}: no such folder ({error.strerror})") from None
    match = HUB_ID.fullmatch(name)
    if match is None or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder (a Hub model is named ORG/NAME)")
    return match


def _download(name: str, repo: str, inside: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    start = f"{inside}/" if inside is not None else ""
    wanted = [f"{start}{pattern}" for pattern in WANTED_FILES]
    # A pattern's star matches slashes too: without this, every checkpoint in a repository would come along.
    unwanted = [f"{start}*/*"]
    # What the client raises without an answer; which HTTP library it uses depends on its version.
    failures: Any = (*(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"), OSError, ValueError)
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except failures as error:
        raise CheckpointError(f"{name}: {_reason(error, revision)}") from None
    if inside is not None and not (folder / inside).is_dir():
        raise CheckpointError(f"{name}: {repo} has no folder {inside} with a model or an adapter")
    return folder / inside if inside is not None else folder


def _reason(error: Exception, revision: str | None) -> str:
    """What keeps a repository from being had, and what to do: the first that holds."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    of_the_disk = isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError)
    partly = "only partly" if type(error).__name__ == "IncompleteSnapshotError" else "not"
    missing = "no such folder, and no such repository on the Hub (a private one needs HF_TOKEN)"
    offline = f"no such folder, and the Hub repository is {partly} in the local cache, and HF_HUB_OFFLINE is set"
    unreachable = (
        f"no such folder, and the Hub cannot be reached at {redacted(constants.ENDPOINT)} ({type(cause).__name__}); "
        f"the repository is {partly} in the local cache"
    )
    reasons: list[tuple[Any, str]] = [
        (isinstance(cause, GatedRepoError), "the repository is gated; accept its terms on the Hub and set HF_TOKEN"),
        (isinstance(cause, RepositoryNotFoundError), missing),
        (isinstance(cause, RevisionNotFoundError), f"the repository has no revision {revision!r}"),
        # Of the client's checks of names.
        (isinstance(error, ValueError), f"no such folder, and no repository's name ({' '.join(str(error).split())})"),
        (of_the_disk, f"cannot be downloaded into the cache ({getattr(error, 'strerror', '')})"),
        (status == 401, "the Hub does not accept the token; log in with `hf auth login`, or set HF_TOKEN"),
        (status is not None, f"the Hub answers {status}; try again later"),
        (constants.is_offline_mode(), offline),
    ]
    return next((reason for holds, reason in reasons if holds), unreachable)
