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

SAMPLE_BYTES, N_SAMPLES = 4096, 16


class Gather(Protocol):
    """Holds this process's shard and fills slots with those of all."""

    name: str
    """For the line that says how a run trains."""
    shard: Tensor
    """This process's bytes; they never change once `connect` was called."""
    is_collective: bool
    """Whether every process must gather in the same order and as often as the others."""

    def connect(self) -> Gather:
        """Make the shards readable for each other, once all are filled. Every process calls it.

        Returns what gathers them: itself, or another if that cannot be.
        """

    def gather(self, spans: Sequence[Span], slot: Tensor, what: str) -> None:
        """Changes `slot` in place: the bytes of `spans`, of all processes, in order of rank.

        On a GPU it is queued on the current stream. `what` is waited for, in words.
        """


class CollectiveGather:
    """One all-gather for each matrix."""

    is_collective = True

    def __init__(self, world: World, shard: Tensor, why: str = "") -> None:
        self.world, self.shard = world, shard
        self.name = f"gathered by {'NCCL' if shard.is_cuda else 'gloo'}{why}"

    def connect(self) -> Gather:
        return self

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

    def connect(self) -> Gather:
        failure, what = "", "the other processes' shards"
        # The shards are whole before anybody reads them.
        torch.cuda.synchronize(self.shard.device)
        try:
            with self.world.waits(what):
                self._map_peers()
        except RuntimeError as error:  # a system that forbids it; all processes are alike in that
            failure = str(error).splitlines()[0]
        failures = self.world.gather(failure, what)
        if not any(failures):
            failures = self.world.gather(self.find_fault(), what)
        why = next((each for each in failures if each), None)
        if why is None:
            return self
        return CollectiveGather(self.world, self.shard, f" (GPUs cannot read each other: {why})")

    def _map_peers(self) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        group = self.world.device_group
        assert group is not None
        self._handle = symmetric.rendezvous(self.shard, group)  # the mappings are its
        shape, kind = tuple(self.shard.shape), self.shard.dtype
        self.peers = [self._handle.get_buffer(rank, shape, kind) for rank in range(self.world.size)]

    def find_fault(self) -> str:
        """Return "" if copies from all peers arrive as they are there, else which do not.

        Where an IOMMU translates addresses between GPUs, they may arrive as garbage without an
        error.
        """
        told = self.world.gather(_samples(self.shard), "samples of the shards")
        own = [_samples(peer) for peer in self.peers]
        wrong = [str(rank) for rank, sample in enumerate(told) if sample != own[rank]]
        return f"bytes of rank {', '.join(wrong)} arrive changed" if wrong else ""

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
    shard = _shared_memory(n_bytes, device) if _can_pull(world, device) else None
    # All processes must come to the same answer: they would wait for each other in vain.
    if not world.any(shard is None, "whether GPUs can read each other's memory"):
        assert shard is not None
        return PulledGather(world, shard)
    del shard
    return CollectiveGather(world, torch.empty(n_bytes, dtype=torch.uint8, device=device))


def _shared_memory(n_bytes: int, device: torch.device) -> Tensor | None:
    """Return memory that other processes can map, or None if this system has none."""
    # Multicast is of no use here, and a program that leaves it behind can block the machine's
    # switches for others.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    from torch.distributed import _symmetric_memory as symmetric

    try:
        shard = symmetric.empty(
            n_bytes, dtype=torch.uint8, device=torch.device("cuda", _index(device))
        )
    except RuntimeError:  # where it is short of memory, so is the other allocator, which says so
        return None
    count_outside(shard)
    return shard


def _samples(shard: Tensor) -> bytes:
    """Return some bytes of a shard, copied as `gather` copies."""
    last = max(0, len(shard) - SAMPLE_BYTES)
    starts = [last * index // (N_SAMPLES - 1) for index in range(N_SAMPLES)]
    samples = shard.new_empty(N_SAMPLES, min(SAMPLE_BYTES, len(shard)))
    for sample, start in zip(samples, starts, strict=True):
        sample.copy_(shard[start : start + len(sample)])
    return samples.cpu().numpy().tobytes()


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
