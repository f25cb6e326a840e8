"""Threads are limited for a block, and as before after it, whatever happens inside."""

from __future__ import annotations

import pytest
import torch
from threadpoolctl import threadpool_info

from surgery.system.threads import one_thread, one_torch_thread


@pytest.mark.parametrize("limit", [one_thread, one_torch_thread])
def test_torch_has_one_thread_inside(limit) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="x"), limit():
            assert torch.get_num_threads() == 1
            if limit is one_thread:
                assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} <= {1}
            raise ValueError("x")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
