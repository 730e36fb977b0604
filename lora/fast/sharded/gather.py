"""How the processes' shards come together in a slot: three twins behind one interface.

- `CollectiveGather` is an all-gather of gloo on a CPU, and of NCCL where processes cannot read each
  other's memory (several machines). All processes must call it in the same order.
- `PulledGather` copies from the peers' memory. On four H100s NCCL's kernels take so many SMs that
  matmuls beside them are 23 % slower; copies take none, and hide behind the matmuls completely.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lora.device import count_outside
from lora.distributed.shards import gather_shards
from lora.distributed.world import World
from lora.fast.sharded.layout import Span


class Gather(Protocol):
    """Holds this process's shard and fills slots with those of all."""

    name: str
    """For the line that says how a run trains."""
    shard: Tensor
    """This process's bytes; they never change once `connect` was called."""
    is_collective: bool
    """Whether every process must gather in the same order and as often as the others."""

    def connect(self) -> None:
        """Make the shards readable for each other, once all are filled. Every process calls it."""

    def gather(self, spans: Sequence[Span], slot: Tensor, what: str) -> None:
        """Changes `slot` in place: the bytes of `spans`, of all processes, in order of rank.

        On a GPU it is queued on the current stream. `what` is waited for, in words.
        """


class CollectiveGather:
    """One all-gather for each matrix."""

    is_collective = True

    def __init__(self, world: World, shard: Tensor) -> None:
        self.world, self.shard = world, shard
        self.name = "gathered by NCCL" if shard.is_cuda else "gathered by gloo"

    def connect(self) -> None:
        """Nothing to do: the collectives connect the processes."""

    def gather(self, spans: Sequence[Span], slot: Tensor, what: str) -> None:
        size = self.world.size
        for span in spans:
            own = self.shard[span.shard_offset : span.shard_offset + span.n_bytes]
            whole = slot[span.slot_offset : span.slot_offset + size * span.n_bytes]
            gather_shards(whole, own, self.world, what)  # bytes: gloo knows no float8


class PulledGather:
    """Each process copies the others' shards, which never change, whenever it needs them.

    No process waits for another, so they need not gather in the same order or as often.
    """

    name = "copied from the other GPUs"
    is_collective = False

    def __init__(self, world: World, shard: Tensor) -> None:
        self.world, self.shard = world, shard
        self.peers: list[Tensor] = []
        """All processes' shards, by rank."""

    def connect(self) -> None:
        # Multicast is of no use here, and a program that leaves it behind can block the machine's
        # switches for others.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        from torch.distributed import _symmetric_memory as symmetric

        # The shards are whole before anybody reads them.
        torch.cuda.synchronize(self.shard.device)
        group = self.world.device_group
        assert group is not None
        with self.world.waits("the other processes' shards"):
            handle = symmetric.rendezvous(self.shard, group)
        self._handle = handle  # the mappings are its
        shape, kind = tuple(self.shard.shape), self.shard.dtype
        self.peers = [handle.get_buffer(rank, shape, kind) for rank in range(self.world.size)]
        self.world.gather(None, "the other processes' shards")

    def gather(self, spans: Sequence[Span], slot: Tensor, what: str) -> None:
        size = self.world.size
        # Each begins at its own shard and goes on to the next, so that no GPU is read by all at
        # once. One stream: several are slower.
        for rank in ((self.world.rank + step) % size for step in range(size)):
            for span in spans:
                source = self.peers[rank][span.shard_offset : span.shard_offset + span.n_bytes]
                start = span.slot_offset + rank * span.n_bytes
                slot[start : start + span.n_bytes].copy_(source)


def choose_gather(world: World, n_bytes: int, device: torch.device) -> Gather:
    """Return the fastest gather that these processes have, with room for `n_bytes` of a shard."""
    # All processes must come to the same answer: they would wait for each other in vain.
    if not world.any(not _can_pull(world, device), "whether GPUs can read each other's memory"):
        from torch.distributed import _symmetric_memory as symmetric

        own = torch.device("cuda", _index(device))
        shard = symmetric.empty(n_bytes, dtype=torch.uint8, device=own)
        count_outside(shard)
        return PulledGather(world, shard)
    return CollectiveGather(world, torch.empty(n_bytes, dtype=torch.uint8, device=device))


def _can_pull(world: World, device: torch.device) -> bool:
    """Whether this process can map the memory of all others."""
    if device.type != "cuda" or world.is_alone or world.local_size != world.size:
        return False
    if torch.cuda.device_count() < world.size:
        return False  # each process sees its own GPU alone
    own = _index(device)
    others = [index for index in range(world.size) if index != own]
    return all(torch.cuda.can_device_access_peer(own, index) for index in others)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
