"""Threads and memory change nothing; progress may fail."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from surgery.codec import workers
from tests.helpers.coded_models import in_bytes, metric_of, model


@pytest.mark.parametrize("with_metric", [False, True])
def test_threads_and_memory_change_nothing(with_metric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = model(10)
    metric = metric_of(layers) if with_metric else None
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(in_bytes(layers, 3000, metric=metric).data)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(each, found[0]) for each in found)
    asked: list[int] = []

    def counted(index: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        asked.append(index)
        return metric(index) if metric else (None, None)

    kept = in_bytes(layers, 3000, metric=counted)
    few = len(asked)
    monkeypatch.setattr(workers, "KEPT", 100_000)
    monkeypatch.setattr(workers, "AT_WORK", 800_000)
    dropped = in_bytes(layers, 3000, metric=counted)
    if with_metric:
        assert few == len(layers) + 1 < len(asked) - few
    assert dropped.relative_error == pytest.approx(kept.relative_error, rel=0.01)


def test_progress_and_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    in_bytes(model(5), 1000, progress=lambda done, whole: seen.append((done, whole)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert all(done <= whole for done, whole in seen) and len(seen) >= 10

    class Stopped(Exception):
        pass

    def stop(done: int, whole: int) -> None:
        raise Stopped

    asked: list[int] = []

    def none(index: int) -> tuple[None, None]:
        asked.append(index)
        time.sleep(0.01)
        return None, None

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(Stopped):
        in_bytes(model(100), 1000, metric=none, progress=stop)
    assert len(asked) < 50  # the rest is not worked on any more
