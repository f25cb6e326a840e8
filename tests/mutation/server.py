"""Runs tests on a changed copy of the package, in processes that are forked after the heavy imports."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Outcome", "Server"]

MEMORY = 24 << 30
COPIED = ("surgery", "tests", "README.md", "pyproject.toml")


@dataclass(frozen=True)
class Outcome:
    """What came of a run of tests.

    Attributes:
        passed: whether all of them did.
        by: the first that failed, or why there is none.
        seconds: of processor time.
    """

    passed: bool
    by: str
    seconds: float


class Server:
    """A private copy of the repository, and processes that run its tests.

    Args:
        root: of the repository.
        tree: where the copy is, or is to be.
    """

    def __init__(self, root: Path, tree: Path) -> None:
        self.tree = tree
        if not tree.is_dir():
            _copy(root, tree)
        self._stamp = time.time() - 1e6
        _prepare(root, tree)

    def source(self, path: str) -> Path:
        """A module's file in the copy, where converters are a folder of the package, as they are installed."""
        return self.tree / (f"surgery/{path}" if path.startswith("converters/") else path)

    @contextlib.contextmanager
    def changed(self, path: str, content: bytes) -> Iterator[None]:
        """The copy with another content of one file, for the time of a block."""
        file = self.source(path)
        before = file.read_bytes()
        try:
            self._write(file, content)
            yield
        finally:
            self._write(file, before)

    def run(self, tests: Sequence[str], seconds: float) -> Outcome:
        """The tests in a process of their own, up to the first that fails.

        Args:
            tests: files, or tests in them.
            seconds: of processor time, after which it is ended, which counts as a failure.

        Raises:
            RuntimeError: pytest itself failed.
        """
        log, scratch = self.tree / "log.txt", self.tree / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        child = os.fork()
        if child == 0:
            _tests(list(tests), log, scratch, seconds)
        status, spent = _waited(child, 10 * seconds)
        if os.WIFSIGNALED(status):
            return Outcome(False, f"signal {os.WTERMSIG(status)}, or out of time", spent)
        code = os.waitstatus_to_exitcode(status)
        text = log.read_text(errors="replace")
        if code not in {0, 1, 2}:
            raise RuntimeError(f"pytest ended with {code}:\n{text[-2000:]}")
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
        return Outcome(code == 0, failed[1].removeprefix("tests/") if failed else "", spent)

    def _write(self, file: Path, content: bytes) -> None:
        file.write_bytes(content)
        # Compiled files are recognised by the second of the change: each change gets one of its own.
        self._stamp += 2
        os.utime(file, (self._stamp, self._stamp))


def _copy(root: Path, tree: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, tree / name, ignore=ignored)
        else:
            tree.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)
    shutil.copytree(root / "converters", tree / "surgery" / "converters", ignore=ignored)


def _prepare(root: Path, tree: Path) -> None:
    """Import what every run needs, and nothing of the package."""
    (tree / "scratch").mkdir(exist_ok=True)
    os.environ.update(
        PYTHONPATH=str(tree),
        HF_HUB_OFFLINE="1",
        HYPOTHESIS_STORAGE_DIRECTORY=str(tree / "scratch"),
        OMP_NUM_THREADS="1",
        TMPDIR=str(tree / "scratch"),
    )
    os.chdir(tree)
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry not in {"", str(root)})]
    if "surgery" in sys.modules:
        raise RuntimeError("the package was imported before it could be changed")
    import datasets  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import scipy.linalg  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "BertModel"):
        getattr(transformers, name)


def _tests(tests: list[str], log: Path, scratch: Path, seconds: float) -> None:
    """In the child: run the tests, and end."""
    code = 3
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 3))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        import hypothesis
        import pytest

        # The first example that fails is enough.
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutation", phases=phases)
        hypothesis.settings.load_profile("mutation")
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # the ones of the working tree
        options = ["-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
        code = int(pytest.main([*options, f"--basetemp={scratch / 'pytest'}", *tests]))
        import surgery

        assert Path(surgery.__file__).is_relative_to(scratch.parent), "the tests ran on another copy"
    finally:
        sys.stdout.flush()
        os._exit(code)


def _waited(child: int, seconds: float) -> tuple[int, float]:
    """Wait for a child and its own, and end what is left of them after so long."""
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - began > seconds:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return status, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
