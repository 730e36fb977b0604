"""Processes of several machines that are started again do not meet those that have died."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from lora.distributed.store import agree
from lora.errors import LostProcessError


def meet(store: dist.Store, ranks: range, size: int, limit_s: float = 20.0) -> set[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return set(pool.map(lambda rank: agree(store, rank, size, limit_s), ranks))


def test_every_start_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    first, second = meet(store, range(3), 3), meet(store, range(3), 3)
    assert len(first) == len(second) == 1
    assert first != second


def test_what_dead_processes_left_is_no_answer() -> None:
    store = dist.HashStore()
    meet(store, range(3), 3)
    with pytest.raises(LostProcessError, match="ranks 1, 2 did not come within 1 s"):
        agree(store, 0, 3, 1.0)
    with pytest.raises(LostProcessError, match="rank 0 did not come within 1 s"):
        agree(store, 1, 3, 1.0)
    assert len(meet(store, range(3), 3)) == 1
