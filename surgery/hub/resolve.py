"""From what the user typed, a folder or a Hub id, to a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from surgery.errors import CheckpointError

__all__ = ["local_folder"]

# A Hub id is `org/name`, optionally with `@revision`. A bare name is taken for a folder: nearly always it is one.
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]


def local_folder(name: str) -> Path:
    """The folder called `name`, or a local copy of the Hub repository called `name`.

    A folder on disk wins over a Hub id. `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` are honoured.

    Raises:
        CheckpointError: there is no such folder, and no such repository can be had.
    """
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
    return _download(match["repo"], match["revision"])


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=WANTED_FILES))
    except GatedRepoError:
        reason = "the repository is gated; accept its terms on the Hub and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "no such folder, and no such repository on the Hub (a private one needs HF_TOKEN)"
    except RevisionNotFoundError:
        reason = f"the repository has no revision {revision!r}"
    except LocalEntryNotFoundError:
        reason = "no such folder, and the Hub repository is neither in the local cache nor reachable"
    except (HfHubHTTPError, OSError) as error:
        reason = f"the Hub cannot be reached ({type(error).__name__})"
    raise CheckpointError(f"{repo}: {reason}")
