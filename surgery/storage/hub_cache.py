"""From what the user typed, a folder or a Hub id, to a local folder."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UnreachableError
from surgery.system.redaction import redacted

__all__ = [
    "cached_files",
    "check_names",
    "download_files",
    "is_legacy_id",
    "local_folder",
    "newest_commit",
    "repos_in",
]

# `org/name`, a folder in it, and a revision. A bare name is taken for a folder: nearly always it is one.
HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<inside>[\w-][\w.-]*(?:/[\w-][\w.-]*)*))?/?(?:@(?P<revision>[\w./-]+))?"
)
# Models that the Hub knows without an organisation, from the time before there were any; no others will be.
LEGACY_IDS = frozenset(
    [
        "albert-base-v1",
        "albert-base-v2",
        "albert-large-v1",
        "albert-large-v2",
        "albert-xlarge-v1",
        "albert-xlarge-v2",
        "albert-xxlarge-v1",
        "albert-xxlarge-v2",
        "bert-base-cased",
        "bert-base-cased-finetuned-mrpc",
        "bert-base-chinese",
        "bert-base-german-cased",
        "bert-base-german-dbmdz-cased",
        "bert-base-german-dbmdz-uncased",
        "bert-base-multilingual-cased",
        "bert-base-multilingual-uncased",
        "bert-base-uncased",
        "bert-large-cased",
        "bert-large-cased-whole-word-masking",
        "bert-large-cased-whole-word-masking-finetuned-squad",
        "bert-large-uncased",
        "bert-large-uncased-whole-word-masking",
        "bert-large-uncased-whole-word-masking-finetuned-squad",
        "camembert-base",
        "ctrl",
        "distilbert-base-cased",
        "distilbert-base-cased-distilled-squad",
        "distilbert-base-german-cased",
        "distilbert-base-multilingual-cased",
        "distilbert-base-uncased",
        "distilbert-base-uncased-distilled-squad",
        "distilbert-base-uncased-finetuned-sst-2-english",
        "distilgpt2",
        "distilroberta-base",
        "gpt2",
        "gpt2-large",
        "gpt2-medium",
        "gpt2-xl",
        "openai-gpt",
        "roberta-base",
        "roberta-base-openai-detector",
        "roberta-large",
        "roberta-large-mnli",
        "roberta-large-openai-detector",
        "t5-11b",
        "t5-3b",
        "t5-base",
        "t5-large",
        "t5-small",
        "transfo-xl-wt103",
        "xlm-clm-ende-1024",
        "xlm-clm-enfr-1024",
        "xlm-mlm-100-1280",
        "xlm-mlm-17-1280",
        "xlm-mlm-en-2048",
        "xlm-mlm-ende-1024",
        "xlm-mlm-enfr-1024",
        "xlm-mlm-enro-1024",
        "xlm-mlm-tlm-xnli15-1024",
        "xlm-mlm-xnli15-1024",
        "xlm-roberta-base",
        "xlm-roberta-large",
        "xlm-roberta-large-finetuned-conll02-dutch",
        "xlm-roberta-large-finetuned-conll02-spanish",
        "xlm-roberta-large-finetuned-conll03-english",
        "xlm-roberta-large-finetuned-conll03-german",
        "xlnet-base-cased",
        "xlnet-large-cased",
    ]
)
NO_FOLDER = "no such folder, and "
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
    return _download(name, found.repo, found.inside, found.revision)


def cached_files(name: str, files: Sequence[str]) -> dict[str, Path]:
    """Those files of a Hub repository that are in the local cache; the Hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    named = _hub_id(name)
    if named is None or named.inside is not None:
        return {}
    found = {file: try_to_load_from_cache(named.repo, file, revision=named.revision) for file in files}
    return {file: Path(path) for file, path in found.items() if isinstance(path, str)}


def newest_commit(repo: str, revision: str | None = None) -> str:
    """Return the commit that a repository has at a revision now, as the Hub says.

    Raises:
        UnreachableError: the Hub does not answer this now.
        CheckpointError: there is no such repository, or it may not be read.
    """
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        raise UnreachableError(f"{repo}: the Hub is not asked, because HF_HUB_OFFLINE is set, and the cache lacks it")
    with _named_failures(repo, revision):
        return str(HfApi().model_info(repo, revision=revision).sha)


def repos_in(namespace: str) -> list[str]:
    """Return the ids of the model repositories of a namespace that this user may see.

    Raises:
        CheckpointError: the Hub does not say.
    """
    from huggingface_hub import HfApi

    with _named_failures(namespace, None):
        return [model.id for model in HfApi().list_models(author=namespace)]


def download_files(repo: str, commit: str, folder: Path, patterns: Sequence[str]) -> None:
    """Download files of a commit into a folder, and compare each with the Hub's own digest of it.

    Args:
        repo: the repository.
        commit: the commit.
        folder: where to; it is there.
        patterns: of files at the top of the repository.

    Raises:
        CheckpointError: the files cannot be had, or one is not what the Hub says it is.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download

    with _named_failures(repo, commit):
        snapshot_download(
            repo, revision=commit, allow_patterns=list(patterns), ignore_patterns=["*/*"], local_dir=folder
        )
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            etag = get_hf_file_metadata(hf_hub_url(repo, path.name, revision=commit)).etag
            if etag is not None and _hub_digest(path, len(etag)) not in (None, etag):
                raise CheckpointError(
                    f"{repo}: {path.name} as it was downloaded is not what the Hub says (its digest is another one); "
                    "ask again"
                )


def _hub_digest(path: Path, length: int) -> str | None:
    """Return a file's digest as the Hub has it: SHA-256 of large files, git's SHA-1 of others, None for other kinds."""
    if length not in (40, 64):
        return None
    digest = hashlib.sha256() if length == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def _named_failures(repo: str, revision: str | None) -> Iterator[None]:
    """Name what keeps a repository from being had, where only the Hub is meant.

    Raises:
        UnreachableError: the Hub cannot be reached, or answers that it cannot serve now.
        CheckpointError: the Hub refuses.
    """
    try:
        yield
    except _failures() as error:
        reason = _reason(error, revision).replace(NO_FOLDER, "")
        cause = error.__cause__ if error.__cause__ is not None else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        later = status is None or status == 429 or status >= 500
        kind = UnreachableError if later and not isinstance(error, ValueError) else CheckpointError
        raise kind(f"{repo}: {reason}") from None


@dataclass(frozen=True)
class _HubId:
    """A repository, a folder inside it, and a revision."""

    repo: str
    inside: str | None
    revision: str | None


def _hub_id(name: str) -> _HubId | None:
    """The parts of a Hub id; None for a name that is none."""
    legacy, _, revision = name.partition("@")
    if legacy in LEGACY_IDS:
        return _HubId(legacy, None, revision or None)
    match = HUB_ID.fullmatch(name)
    return _HubId(match["repo"], match["inside"], match["revision"]) if match is not None else None


def is_legacy_id(name: str) -> bool:
    """Return whether a name is a model that the Hub knows without an organisation, such as `gpt2`."""
    return name in LEGACY_IDS


def _folder_or_id(name: str) -> Path | _HubId:
    path = Path(name)
    try:
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{name}: is a file, expected a folder")
    except OSError as error:  # a name that no file system takes
        raise CheckpointError(f"{name}: no such folder ({error.strerror})") from None
    named = _hub_id(name)
    if named is None or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder (a Hub model is named ORG/NAME)")
    return named


def _download(name: str, repo: str, inside: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    start = f"{inside}/" if inside is not None else ""
    wanted = [f"{start}{pattern}" for pattern in WANTED_FILES]
    # A pattern's star matches slashes too: without this, every checkpoint in a repository would come along.
    unwanted = [f"{start}*/*"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except _failures() as error:
        raise CheckpointError(f"{name}: {_reason(error, revision)}") from None
    if inside is not None and not (folder / inside).is_dir():
        raise CheckpointError(f"{name}: {repo} has no folder {inside} with a model or an adapter")
    return folder / inside if inside is not None else folder


def _failures() -> Any:
    """Return what the client raises without an answer; which HTTP library it uses depends on its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"), OSError, ValueError)


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
