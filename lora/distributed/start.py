"""Joining the other processes of a run, as torchrun's environment names them, and leaving them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from lora.distributed.world import ALONE, World

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What torchrun sets for each process, beside the address of the first."""
MAX_WAIT = timedelta(minutes=30)
"""For the others in one collective: longer than rank 0 takes to write a large model."""
_joins = itertools.count()
"""Numbers the groups of this process: all processes join the same ones in the same order."""


def world_size() -> int:
    """Return how many processes torchrun has started for this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is rank 0, or not one of several."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Within the block this process is one of those that torchrun started, or alone.

    `device` is the one of this process: NCCL connects GPUs, gloo the hosts.
    """
    if world_size() == 1:
        yield ALONE
        return
    ranks = {name: int(os.environ[name]) for name in VARIABLES}
    is_owner = not dist.is_initialized()
    if is_owner:
        kind = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # Addresses of an earlier group are still in the store: a second one must not read them.
        store = dist.PrefixStore(f"group-{next(_joins)}", _store())
        size = ranks["WORLD_SIZE"]
        dist.init_process_group(
            kind, store=store, rank=ranks["RANK"], world_size=size, timeout=MAX_WAIT
        )
    try:
        yield World(
            rank=ranks["RANK"],
            size=ranks["WORLD_SIZE"],
            local_rank=ranks["LOCAL_RANK"],
            local_size=ranks["LOCAL_WORLD_SIZE"],
            host_group=dist.new_group(backend="gloo", timeout=MAX_WAIT),
            device_group=dist.group.WORLD,
        )
    finally:
        if is_owner:
            dist.destroy_process_group()


@functools.cache  # where rank 0 serves it, it must outlive the first group
def _store() -> dist.Store:
    """Return where the processes leave their addresses for each other."""
    store: dist.Store = next(dist.rendezvous("env://", timeout=MAX_WAIT))[0]
    return store
