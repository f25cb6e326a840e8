"""A hub on 127.0.0.1: as much of the Hub's HTTP interface as huggingface_hub, peft and transformers use.

Repositories live in memory, large files on the disk. Faults are ordered per request: an answer of another status, a
connection that breaks off, or a call to make before the request is served. Run as a program, with the size of parts
where files come in parts, it prints its address and serves until its standard input ends.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

PIECE = 1 << 16
LARGE = (".safetensors", ".bin", ".png")
# Tokens as long as real ones.
OWNER, STRANGER = "hf_OwnerOwnerOwnerOwnerOwnerOwner01", "hf_StrangerStrangerStrangerStranger2"
ID = r"(?P<repo>[^/]+/[^/]+)"


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its content where it is small, its SHA-256 in the store where it is large."""

    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def git_oid(self) -> str:
        """What git calls the file, or the pointer that stands for it."""
        content = self.content if self.content is not None else f"{self.sha256} {self.size}".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One commit: its files, title and parent."""

    files: dict[str, Blob]
    title: str
    parent: str | None

    @property
    def sha(self) -> str:
        """Its name."""
        parts = [self.title, str(self.parent), *(f"{p} {b.git_oid}" for p, b in sorted(self.files.items()))]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()


@dataclass
class Repo:
    """A repository: commits by name, branches and pull requests by name."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def add(self, branch: str, files: dict[str, Blob], title: str, parent: str | None) -> str:
        """Put a commit on a branch."""
        commit = Commit(files, title, parent)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def head(self, revision: str) -> str | None:
        """The commit that a branch or a name means."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens to the next `times` requests whose line matches."""

    pattern: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    drop_answer: bool = False
    action: Callable[[], None] | None = None


class Hub:
    """The server. Use as a context manager.

    Attributes:
        repos: repositories by id.
        users: names by token.
        members: the organisations in which a user may write.
        part_size: files of more bytes are uploaded in parts; None never.
        xet: answer of the Xet token route: 404, as servers without Xet do, or another status.
        requests: the lines of all requests, `POST /api/repos/create`.
        tokens_seen: the authorization headers that came.
    """

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[str, Repo] = {}
        self.users = {OWNER: "ada", STRANGER: "eve"}
        self.members = {"ada": {"org", "bases"}, "eve": set()}
        self.part_size: int | None = None
        self.requests: list[str] = []
        self.tokens_seen: set[str] = set()
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.folder = Path(tempfile.mkdtemp(prefix="surgery-hub-"))
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """Answer nothing any more."""
        self.server.shutdown()
        self.server.server_close()

    def clear(self) -> None:
        """Forget everything, as if newly started."""
        self.repos.clear()
        self.requests.clear()
        self.tokens_seen.clear()
        self.faults.clear()
        self.part_size = None
        for path in self.folder.iterdir():
            path.unlink()

    def answer(self, pattern: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer matching requests with a status and nothing else."""
        self.faults.append(Fault(pattern, times, status=status, headers=headers))

    def drop(self, pattern: str, after: int = 0, times: int = 1) -> None:
        """Break the connection after so many bytes of a matching request's body."""
        self.faults.append(Fault(pattern, times, drop_after=after))

    def drop_answer(self, pattern: str, times: int = 1) -> None:
        """Do what a matching request asks for, and break the connection before answering."""
        self.faults.append(Fault(pattern, times, drop_answer=True))

    def before(self, pattern: str, action: Callable[[], None], times: int = 1) -> None:
        """Call something before a matching request is served."""
        self.faults.append(Fault(pattern, times, action=action))

    def repo(self, repo: str, private: bool = False, gated: bool = False) -> Repo:
        """A repository, made if there is none."""
        if repo not in self.repos:
            made = Repo(private, gated)
            made.add("main", {".gitattributes": Blob(0, b"")}, "initial commit", None)
            self.repos[repo] = made
        return self.repos[repo]

    def commit(self, repo: str, files: dict[str, bytes], title: str = "by hand", branch: str = "main") -> str:
        """Add files to a branch, past all checks."""
        target = self.repo(repo)
        head = target.branches.get(branch, target.branches["main"])
        blobs = {path: self.stored(path, content) for path, content in files.items()}
        return target.add(branch, {**target.commits[head].files, **blobs}, title, head)

    def publish(self, repo: str, folder: Path, **options: Any) -> None:
        """Make a repository of a folder."""
        self.repo(repo, **options)
        self.commit(repo, {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})

    def stored(self, path: str, content: bytes) -> Blob:
        """A file's entry; the content of a large one is put into the store."""
        if not content or not path.endswith(LARGE):
            return Blob(len(content), content=content)
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / sha256).write_bytes(content)
        return Blob(len(content), sha256=sha256)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files at a revision."""
        found = self.repos[repo]
        head = found.head(revision)
        assert head is not None
        return {path: self.content(blob) for path, blob in found.commits[head].files.items() if path[0] != "."}

    def content(self, blob: Blob) -> bytes:
        """What is in a file."""
        return blob.content if blob.content is not None else (self.folder / str(blob.sha256)).read_bytes()

    def titles(self, repo: str, revision: str = "main") -> list[str]:
        """The titles of the commits at a revision, the newest first."""
        found = self.repos[repo]
        sha, titles = found.head(revision), []
        while sha is not None:
            titles.append(found.commits[sha].title)
            sha = found.commits[sha].parent
        return titles

    def count(self, pattern: str) -> int:
        """How many requests came whose line matches."""
        return sum(1 for line in self.requests if re.search(pattern, line))


class _Dropped(Exception):
    """The connection was broken on purpose."""


class _Refused(Exception):
    """The answer to a request that is not allowed."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    """Serves one connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    # Head and body of an answer are written one after the other; without this the second waits for 40 ms.
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """GET, and through it every method."""
        with contextlib.suppress(_Dropped, ConnectionError):
            self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        path, self.query = urlsplit(self.path).path, urlsplit(self.path).query
        line = f"{self.command} {path}"
        fault = self._fault(line)
        self.left = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.action is not None:
            fault.action()
        if fault is not None and fault.drop_after is not None:
            self._read(fault.drop_after)
            self._break()
        try:
            if fault is not None and fault.status is not None:
                self._rest()
                return self._send(fault.status, b"", fault.headers)
            for method, pattern, serve in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match is not None and method == self.command:
                    self.lost = fault is not None and fault.drop_answer
                    return serve(self, **{name: unquote(value) for name, value in match.groupdict().items()})
            self._rest()
            self._json({"error": f"no route {line}"}, 404)
        except _Refused as refused:
            self._rest()
            named = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._json({"error": refused.message}, refused.status, {k: v for k, v in named.items() if v})

    def _fault(self, line: str) -> Fault | None:
        with self.hub.lock:
            self.hub.requests.append(line)
            if "Authorization" in self.headers:
                self.hub.tokens_seen.add(self.headers["Authorization"])
            for fault in self.hub.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    # Reading and answering

    def _pieces(self, count: int | None = None) -> Iterator[bytes]:
        wanted = self.left if count is None else min(count, self.left)
        while wanted:
            piece = self.rfile.read(min(PIECE, wanted))
            if not piece:
                raise _Dropped
            wanted -= len(piece)
            self.left -= len(piece)
            yield piece

    def _read(self, count: int | None = None) -> bytes:
        return b"".join(self._pieces(count))

    def _rest(self) -> None:
        for _ in self._pieces():
            pass

    def _body(self) -> dict[str, Any]:
        return dict(json.loads(self._read() or b"{}"))

    def _break(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        raise _Dropped

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        if getattr(self, "lost", False):
            self.lost = False
            self._break()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    # Who may do what

    def _user(self) -> str | None:
        """The user of the token, or None without one.

        Raises:
            _Refused: the token is not known.
        """
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return user

    def _writes(self, user: str | None, repo: str) -> bool:
        owner = repo.partition("/")[0]
        return user is not None and (owner == user or owner in self.hub.members[user])

    def _found(self, repo: str, write: bool = False) -> Repo:
        user = self._user()
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self._writes(user, repo)):
            raise _Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not self._writes(user, repo):
            raise _Refused(403 if user else 401, message="You don't have the rights to write here")
        return found

    def _commit_at(self, repo: str, revision: str) -> tuple[Repo, str, Commit]:
        found = self._found(repo)
        sha = found.head(revision)
        if sha is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found, sha, found.commits[sha]

    # Routes: accounts and repositories

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _Refused(401, message="Invalid username or password.")
        orgs = [{"name": name} for name in sorted(self.hub.members[user])]
        self._json({"type": "user", "name": user, "orgs": orgs, "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        body, user = self._body(), self._user()
        repo = f"{body.get('organization') or user}/{body['name']}"
        if not self._writes(user, repo):
            raise _Refused(403 if user else 401, message="You don't have the rights to create a model here")
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        self.hub.repo(repo, private=body.get("visibility") == "private" or body.get("private") is True)
        self._json({"url": url})

    def delete(self) -> None:
        body, user = self._body(), self._user()
        repo = f"{body.get('organization') or user}/{body['name']}"
        self._found(repo, write=True)
        del self.hub.repos[repo]
        self._json({})

    def info(self, repo: str, revision: str = "main") -> None:
        found, sha, commit = self._commit_at(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        gated = "manual" if found.gated else False
        self._json({"id": repo, "sha": sha, "private": found.private, "gated": gated, "siblings": siblings, "tags": []})

    def models(self) -> None:
        author = dict(parse_qsl(self.query)).get("author")
        seen = [repo for repo, found in self.hub.repos.items() if not found.private or self._writes(self._user(), repo)]
        self._json([{"id": repo} for repo in seen if repo.partition("/")[0] == author])

    def branch(self, repo: str, branch: str) -> None:
        start = self._body().get("startingPoint") or "main"
        found = self._found(repo, write=True)
        if branch in found.branches:
            return self._json({"error": f"Reference already exists: {branch}"}, 409)
        found.branches[branch] = str(found.head(start))
        self._json({})

    def delete_branch(self, repo: str, branch: str) -> None:
        del self._found(repo, write=True).branches[branch]
        self._json({})

    # Routes: reading

    def tree(self, repo: str, revision: str) -> None:
        _, _, commit = self._commit_at(repo, revision)
        entries = []
        for path, blob in sorted(commit.files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.git_oid}
            if blob.sha256 is not None:
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found, sha, commit = self._commit_at(repo, revision)
        if found.gated and not self._writes(self._user(), repo):
            raise _Refused(403 if self._user() else 401, "GatedRepo", f"Access to model {repo} is restricted")
        blob = commit.files.get(path)
        if blob is None:
            self._rest()
            refused = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            return self._json({"error": "Entry not found"}, 404, refused)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.git_oid}"', "Accept-Ranges": "none"}
        if blob.sha256 is not None:
            headers.update({"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)})
        self._send(200, self.hub.content(blob), headers)

    # Routes: writing

    def validate_yaml(self) -> None:
        content = self._body()["content"]
        errors = [] if content.startswith("---\n") else [{"message": "there is no metadata"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def no_xet(self, repo: str, revision: str) -> None:
        raise _Refused(404, message="Not Found")

    def preupload(self, repo: str, revision: str) -> None:
        files = self._body()["files"]
        self._found(repo, write="create_pr=1" not in self.query)
        _, _, commit = self._commit_at(repo, revision)
        answers = []
        for file in files:
            large = file["path"].endswith(LARGE)
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            there = commit.files.get(file["path"])
            if there is not None:
                answer["oid"] = there.sha256 or there.git_oid
            answers.append(answer)
        self._json({"files": answers})

    def batch(self, repo: str) -> None:
        objects = []
        for wanted in self._body()["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.hub.folder / wanted["oid"]).exists():
                entry["actions"] = {
                    "upload": self._upload(wanted["oid"], wanted["size"]),
                    "verify": {"href": f"{self.hub.url}/verify"},
                }
            objects.append(entry)
        if self._user() is None:
            raise _Refused(401, message="log in to upload")
        self._found(repo)
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, size: int) -> dict[str, Any]:
        part = self.hub.part_size
        # A signature in the address, as storage services have it: it is as good as a password for a while.
        signature = "?X-Amz-Signature=signed"
        if part is None or size <= part:
            return {"href": f"{self.hub.url}/store/{oid}{signature}"}
        numbers = range(1, -(-size // part) + 1)
        urls = {str(n): f"{self.hub.url}/store/{oid}/{n}{signature}" for n in numbers}
        return {"href": f"{self.hub.url}/complete/{oid}", "header": {"chunk_size": str(part), **urls}}

    def store(self, oid: str, number: str = "") -> None:
        target = self.hub.folder / (f"{oid}.part{number}" if number else oid)
        digest = hashlib.sha256()
        partial = target.with_name(f"{target.name}.{threading.get_ident()}")
        try:
            with partial.open("wb") as file:
                for piece in self._pieces():
                    digest.update(piece)
                    file.write(piece)
            if not number and digest.hexdigest() != oid:
                raise _Refused(400, message="the content has another digest")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        self._send(200, b"", {"ETag": f'"{digest.hexdigest()}"'})

    def complete(self, oid: str) -> None:
        parts = [self.hub.folder / f"{oid}.part{part['partNumber']}" for part in self._body()["parts"]]
        content = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, message="the parts have another digest")
        (self.hub.folder / oid).write_bytes(content)
        self._json({})

    def verify(self) -> None:
        body = self._body()
        there = (self.hub.folder / body["oid"]).stat().st_size == body["size"]
        self._json({}, 200 if there else 400)

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._read().splitlines()]
        header = lines[0]["value"]
        as_pr = "create_pr=1" in self.query
        with self.hub.lock:
            found = self._found(repo, write=not as_pr)
            if as_pr and self._user() is None:
                raise _Refused(401, message="log in to open a pull request")
            _, sha, commit = self._commit_at(repo, revision)
            if not as_pr and header.get("parentCommit") not in {None, sha}:
                raise _Refused(412, message="A commit has happened since. Please refresh and try again.")
            files = {**commit.files, **dict(self._changed(line) for line in lines[1:])}
            branch = revision
            if as_pr:
                found.pull_requests += 1
                branch = f"refs/pr/{found.pull_requests}"
            new = found.add(branch, files, header["summary"], sha)
        answer = {"commitOid": new, "commitUrl": f"{self.hub.url}/{repo}/commit/{new}", "success": True}
        if as_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{found.pull_requests}"
        self._json(answer)

    def _changed(self, line: dict[str, Any]) -> tuple[str, Blob]:
        value = line["value"]
        if line["key"] == "file":
            content = base64.b64decode(value["content"])
            return value["path"], Blob(len(content), content=content)
        assert line["key"] == "lfsFile", line["key"]
        if not (self.hub.folder / value["oid"]).exists():
            raise _Refused(400, message=f"{value['path']} was not uploaded")
        return value["path"], Blob(value["size"], sha256=value["oid"])


_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("DELETE", "/api/repos/delete", _Handler.delete),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", "/api/models", _Handler.models),
    ("GET", f"/api/models/{ID}", _Handler.info),
    ("GET", f"/api/models/{ID}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", f"/api/models/{ID}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", f"/api/models/{ID}/xet-write-token/(?P<revision>[^/]+)", _Handler.no_xet),
    ("POST", f"/api/models/{ID}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("DELETE", f"/api/models/{ID}/branch/(?P<branch>[^/]+)", _Handler.delete_branch),
    ("POST", f"/api/models/{ID}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{ID}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", f"/{ID}.git/info/lfs/objects/batch", _Handler.batch),
    ("HEAD", f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("GET", f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("PUT", "/store/(?P<oid>[0-9a-f]+)", _Handler.store),
    ("PUT", "/store/(?P<oid>[0-9a-f]+)/(?P<number>[0-9]+)", _Handler.store),
    ("POST", "/complete/(?P<oid>[0-9a-f]+)", _Handler.complete),
    ("POST", "/verify", _Handler.verify),
]


if __name__ == "__main__":
    with Hub() as hub:
        hub.part_size = int(sys.argv[1]) if len(sys.argv) > 1 else None
        print(hub.url, flush=True)
        sys.stdin.read()
