"""Gathering shards: every process's rows in their places, whoever brings them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora.device import Share
from lora.distributed.world import ALONE, World
from lora.fast.sharded.gather import CollectiveGather, PulledGather, choose_gather
from lora.fast.sharded.layout import ShardedMatrix, Unit, place
from tests.distributed.processes import run_processes

SIZES = ((7, 5, 2), (1, 8, 0), (12, 3, 1))
"""Rows, columns and room for LoRA of a unit's matrices."""


def unit_of(share: Share) -> Unit:
    matrices = [
        ShardedMatrix(share, rows, columns, extra, torch.float32, [[("w", slice(0, rows))]])
        for rows, columns, extra in SIZES
    ]
    place(matrices)
    return Unit("block 0", matrices, 0, shard_start=512)


def whole_of(number: int, matrix: ShardedMatrix) -> Tensor:
    size = matrix.outputs * matrix.inputs
    return torch.arange(size, dtype=torch.float32).view(matrix.outputs, -1) + 1000 * number


def filled_shard(share: Share) -> Tensor:
    unit = unit_of(share)
    shard = torch.zeros(512 + unit.shard_bytes, dtype=torch.uint8)
    for number, matrix in enumerate(unit.matrices):
        own = matrix.own_part(shard[512:])[:, : matrix.inputs]
        own.copy_(whole_of(number, matrix)[matrix.own_rows])
    return shard


def check(unit: Unit, slot: Tensor) -> None:
    for number, matrix in enumerate(unit.matrices):
        view = matrix.view_of(slot)[: matrix.outputs, : matrix.inputs]
        assert torch.equal(view, whole_of(number, matrix)), number


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_copies_from_the_peers_are_whole(size: int) -> None:
    shards = [filled_shard(Share(rank, size)) for rank in range(size)]
    for rank in range(size):
        gather = PulledGather(World(rank=rank, size=size), shards[rank])
        gather.peers = shards
        unit = unit_of(Share(rank, size))
        slot = torch.zeros(unit.slot_bytes, dtype=torch.uint8)
        gather.gather(unit.spans(), slot, "a unit")
        check(unit, slot)


def _collect(world: World) -> bool:
    unit = unit_of(world.share)
    gather = CollectiveGather(world, filled_shard(world.share))
    slot = torch.zeros(unit.slot_bytes, dtype=torch.uint8)
    gather.gather(unit.spans(), slot, "a unit")
    check(unit, slot)
    return _finds_faults(world)


def _finds_faults(world: World) -> bool:
    """Return whether bytes that arrive changed are found in the process where they do."""
    shards = [filled_shard(Share(rank, world.size)) for rank in range(world.size)]
    gather = PulledGather(world, shards[world.rank])
    gather.peers = shards
    assert gather.find_fault() == ""
    if world.rank == 1:
        gather.peers = [shards[0] + 1, *shards[1:]]
    return gather.find_fault() == ("bytes of rank 0 arrive changed" if world.rank == 1 else "")


def test_a_collective_is_whole_and_changed_bytes_are_found() -> None:
    assert run_processes(3, _collect) == [True] * 3


def test_one_process_and_a_cpu_gather_without_peers() -> None:
    gather = choose_gather(ALONE, 10, torch.device("cpu"))
    assert isinstance(gather, CollectiveGather)
    assert gather.connect() is gather
    assert gather.name == "gathered by gloo"
