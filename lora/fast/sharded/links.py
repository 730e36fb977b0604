"""How fast the devices of a run exchange data, measured."""

from __future__ import annotations

import time

import torch

from lora.device import synchronize
from lora.distributed.shards import gather_shards
from lora.distributed.world import World

PROBE_BYTES = 64 * 2**20
"""What each process sends: so much that latency hardly counts, and little memory."""
N_PROBES = 3


def measure_link(world: World, device: torch.device, n_bytes: int = PROBE_BYTES) -> float:
    """Return the bytes per second that a device receives from all others, of the slowest one.

    Called by all processes of `world`, which are several. The first exchange opens the connections
    and does not count.
    """
    own = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    everyones = own.new_empty(world.size * n_bytes)
    seconds, what = [], "the speed of the links between devices"
    for _ in range(1 + N_PROBES):
        synchronize(device)
        start_s = time.perf_counter()
        gather_shards(everyones, own, world, what)
        with world.waits(what):
            synchronize(device)
        seconds.append(time.perf_counter() - start_s)
    speed = (world.size - 1) * n_bytes / min(seconds[1:])
    slowest: float = min(world.gather(speed, "the speed of all links"))
    return slowest
