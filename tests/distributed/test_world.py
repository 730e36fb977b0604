"""Collectives of several processes, and of one that runs alone."""

from __future__ import annotations

import torch

from lora.device import Share
from lora.distributed.world import ALONE, World
from tests.distributed.processes import run_processes


def _collectives(world: World) -> tuple[float, float, list[int], str, bool]:
    summed, sent = torch.tensor(float(world.rank + 1)), torch.tensor(float(world.rank))
    world.sum(summed, "a sum")
    world.broadcast(sent, "a broadcast")
    gathered = world.gather(world.rank * 10, "numbers")
    first = world.from_main(f"of {world.rank}", "a word")
    return summed.item(), sent.item(), gathered, first, world.any(world.rank == 1, "a flag")


def test_collectives_of_three_processes() -> None:
    expected = (6.0, 0.0, [0, 10, 20], "of 0", True)
    assert run_processes(3, _collectives) == [expected] * 3


def test_alone_collectives_change_nothing() -> None:
    assert _collectives(ALONE) == (1.0, 0.0, [0], "of 0", False)


def test_shares_cover_a_batch_once() -> None:
    for count in range(12):
        for size in range(1, 6):
            shares = [Share(rank, size) for rank in range(size)]
            taken = [index for share in shares for index in range(count)[share.part(count)]]
            assert taken == list(range(count))
            lengths = [len(range(count)[share.part(count)]) for share in shares]
            assert max(lengths) - min(lengths) <= 1
            assert max(lengths) == shares[0].largest(count)
