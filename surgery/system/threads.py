"""How many threads a piece of linear algebra gets on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from threadpoolctl import ThreadpoolController

__all__ = ["one_thread", "one_torch_thread"]


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread while LAPACK, through scipy, works with all of them.

    torch and scipy bring a pool of threads each. After every parallel operation torch's go on spinning for a while,
    on the cores that LAPACK's next call needs; what torch does here in between is bound by memory, not by cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch and LAPACK to one thread: for matrices so small that waking others costs more than they save."""
    with one_torch_thread(), ThreadpoolController().limit(limits=1, user_api="blas"):
        yield
