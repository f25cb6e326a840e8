"""Progress on stderr: a bar on a terminal, a line every 30 seconds without one."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

from surgery.cli import streams
from surgery.system.progress import Progress
from surgery.system.text import human_bytes, human_seconds

__all__ = ["aside_from_bars", "progress_bar"]

SECONDS_BETWEEN_LINES = 30.0
# The width of a terminal that does not say how wide it is, as those of continuous integration and `docker -t`.
USUAL_WIDTH, USUAL_HEIGHT = 80, 24


@contextlib.contextmanager
def progress_bar(label: str, wanted: bool, unit: str = "weight") -> Iterator[Progress | None]:
    """Give the callback that shows how far the work is; None where progress is not wanted.

    Args:
        label: the work, as the line begins.
        wanted: whether to show anything.
        unit: the noun for one piece; `B` for bytes.
    """
    if not wanted:
        yield None
    elif sys.stderr.isatty():
        with _bar(label, unit) as move:
            yield move
    else:
        with _lines(label, unit) as move:
            yield move


@contextlib.contextmanager
def aside_from_bars() -> Iterator[None]:
    """Take the bars away from the terminal while something else is printed."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            yield
    else:
        yield


@contextlib.contextmanager
def _bar(label: str, unit: str) -> Iterator[Progress]:
    from tqdm import tqdm

    # tqdm asks the terminal for what is None, and shows nothing on one of no width or no height.
    width, height = (None, None) if _terminal_width() else (USUAL_WIDTH, USUAL_HEIGHT)
    with tqdm(
        desc=label, unit=unit, unit_scale=unit == "B", leave=False, file=sys.stderr, ncols=width, nrows=height,
        dynamic_ncols=width is None,
    ) as bar:  # fmt: skip

        def move(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)

        yield move


def _terminal_width() -> int:
    """Return how many columns the terminal of standard error has; 0 where it does not say."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


@contextlib.contextmanager
def _lines(label: str, unit: str) -> Iterator[Progress]:
    """Print from a thread of its own, so that a step that takes minutes does not look like a hang."""
    lines = _Lines(label, unit)
    ended = threading.Event()

    def speak() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            streams.write(lines.text(), err=True)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield lines.move
    finally:
        ended.set()
        speaker.join()


class _Lines:
    """The state of the work, as a line of text."""

    def __init__(self, label: str, unit: str) -> None:
        self.label, self.unit = label, unit
        self.began = time.monotonic()
        self.state: tuple[int, int, str] | None = None
        self._first: tuple[float, int] | None = None

    def move(self, done: int, total: int, what: str) -> None:
        """Note how far the work is."""
        if self._first is None or done < self.state_done:
            self._first = time.monotonic(), done
        self.state = done, total, what

    @property
    def state_done(self) -> int:
        """How many pieces are done."""
        return self.state[0] if self.state is not None else 0

    def text(self) -> str:
        """Return the line: `init frod: 12 of 36 weights, q_proj, about 3 min left`."""
        if self.state is None:
            return f"{self.label}: at work for {human_seconds(time.monotonic() - self.began)}"
        done, total, what = self.state
        if self.unit == "B":
            count = f"{human_bytes(done)} of {human_bytes(total)}"
        else:
            count = f"{done:,} of {total:,} {self.unit}s"
        return ", ".join(part for part in (f"{self.label}: {count}", what, self._left(done, total)) if part)

    def _left(self, done: int, total: int) -> str:
        assert self._first is not None
        began, first = self._first
        if done <= first or total <= done:
            return ""
        return f"about {human_seconds((time.monotonic() - began) / (done - first) * (total - done))} left"
