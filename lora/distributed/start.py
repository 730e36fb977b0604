"""Joining the other processes of a run, as torchrun's environment names them, and leaving them."""

from __future__ import annotations

import contextlib
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
        dist.init_process_group(kind, timeout=MAX_WAIT)
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
