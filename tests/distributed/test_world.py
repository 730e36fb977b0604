"""Collectives of several processes, and of one that runs alone."""

from __future__ import annotations

import torch

from lora.device import Share
from lora.distributed.world import ALONE, World
from lora.errors import Interrupted, RunNotFoundError
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


def _errors_of_rank_0(world: World) -> list[tuple[str, str, int]]:
    found = []
    for failure in (RunNotFoundError("no run"), Interrupted("SIGTERM: stopped the save.", 143)):

        def fail(failure: Exception = failure) -> None:
            raise failure

        try:
            world.on_main(fail, "an error")
        except (RunNotFoundError, Interrupted) as error:
            code = error.exit_code if isinstance(error, Interrupted) else 2
            found.append((type(error).__name__, str(error), code))
    return found


def test_an_error_of_rank_0_is_the_same_in_all_with_its_exit_code() -> None:
    expected = [
        ("RunNotFoundError", "no run", 2),
        ("Interrupted", "SIGTERM: stopped the save.", 143),
    ]
    assert run_processes(2, _errors_of_rank_0) == [expected] * 2
    assert _errors_of_rank_0(ALONE) == expected


def _errors_of_one_rank(world: World) -> tuple[int, str]:
    def fail_on_rank_1() -> int:
        if world.rank == 1:
            raise RunNotFoundError("no run on rank 1")
        return world.rank

    own = world.on_all(lambda: world.rank, "no error")
    try:
        world.on_all(fail_on_rank_1, "an error")
    except RunNotFoundError as error:
        return own, str(error)
    return own, ""


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    assert run_processes(3, _errors_of_one_rank) == [(n, "no run on rank 1") for n in range(3)]
    assert _errors_of_one_rank(ALONE) == (0, "")


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
