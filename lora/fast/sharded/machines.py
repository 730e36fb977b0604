"""The processes of one machine among those of a run: a world of their own, with its own groups."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from lora.distributed.world import World


def machine_devices(world: World) -> int | None:
    """Return how many processes each machine has; None for one machine, or one process on each.

    None too where machines have unequal numbers. Every process calls it.
    """
    here = world.rank - world.local_rank, world.local_size
    found = sorted(set(world.gather(here, "the processes of each machine")))
    size = found[0][1]
    # Ranks of a machine follow each other, as torchrun numbers them.
    are_alike = found == [(start, size) for start in range(0, world.size, size)]
    return size if 1 < size < world.size and are_alike else None


def machine_world(world: World) -> World:
    """Return the world of this process's machine; `machine_devices` must have found some.

    For sums and gathers: rank 0 of `from_main` and `broadcast` is that of the run. Every process of
    `world` calls it, the same number of times.
    """
    size = world.local_size
    host_group = device_group = None
    # Of every machine, because making a group takes all processes.
    for start in range(0, world.size, size):
        ranks = list(range(start, start + size))
        host, device = dist.new_group(ranks, backend="gloo"), dist.new_group(ranks)
        if world.rank in ranks:
            host_group, device_group = host, device
    return replace(
        world, rank=world.local_rank, size=size, host_group=host_group, device_group=device_group
    )
