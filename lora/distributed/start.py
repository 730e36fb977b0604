"""Joining the other processes of a run, as torchrun's environment names them, and leaving them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lora.distributed.ranks import this_rank, world_size
from lora.distributed.store import meeting_store, shared_store, start_name
from lora.distributed.watch import WaitLimits, Watch
from lora.distributed.world import ALONE, World
from lora.errors import CheckpointError, ConfigError, LoraError

WAIT_VARIABLE = "LORALM_MAX_WAIT_S"
"""Environment variable: seconds after which a wait for the other processes ends the run."""
MAX_LIMIT_S = 7 * 24 * 3600
SPARE = timedelta(minutes=5)
"""PyTorch's own limit is so much longer: it prints stacks, the watch a sentence."""
_joins = itertools.count()
"""Numbers the groups of this process: all processes join the same ones in the same order."""


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Within the block this process is one of those that torchrun started, or alone.

    `device` is the one of this process: NCCL connects GPUs, gloo the hosts.
    """
    if world_size() == 1:
        yield ALONE
        return
    here, is_owner, limits = this_rank(), not dist.is_initialized(), _limits()
    limit = timedelta(seconds=limits.total_s) + SPARE
    with Watch(here.rank, here.size, shared_store(_store()), limits) as watch:
        if is_owner:
            if device.type == "cuda":  # Triton and NCCL take the current one
                torch.cuda.set_device(device)
            kind = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            # Addresses of an earlier group are still in the store, also those of processes that
            # torchrun has replaced by these: another group must not read them.
            name = f"group-{start_name()}-{next(_joins)}"
            store = dist.PrefixStore(name, _store())
            with watch.waits("all processes to start"):
                dist.init_process_group(
                    kind, store=store, rank=here.rank, world_size=here.size, timeout=limit
                )
        with watch.waits("all processes to start"):
            host_group = dist.new_group(backend="gloo", timeout=limit)
        yield World(
            **vars(here),
            host_group=host_group,
            device_group=dist.group.WORLD,
            waits=watch.waits,
        )
        # Not after an error: the others may be elsewhere and never leave with this one.
        if is_owner:
            dist.destroy_process_group()


def from_first(key: str, make: Callable[[], Any]) -> Any:
    """Return what `make` returns on rank 0, which alone calls it, before the processes join: JSON.

    An error that lora raises on purpose is raised by every rank. `key` is used once.
    """
    store = _store()
    if this_rank().rank > 0:
        answer = json.loads(store.get(key))
        if "error" in answer:
            raise CheckpointError(answer["error"])
        return answer["value"]
    try:
        value = make()
    except LoraError as error:
        store.set(key, json.dumps({"error": str(error)}))
        raise
    store.set(key, json.dumps({"value": value}))
    return value


@functools.cache  # where rank 0 serves it, it must outlive the first group
def _store() -> dist.Store:
    """Return where the processes leave their addresses for each other."""
    return meeting_store(_limits().total_s)


def _limits() -> WaitLimits:
    """Return the limits of all waits; a low total lowers all of them."""
    usual, text = WaitLimits(), os.environ.get(WAIT_VARIABLE)
    if not text:
        return usual
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = 0.0
    if not 1 <= limit_s <= MAX_LIMIT_S:
        raise ConfigError(
            f"Cannot use {WAIT_VARIABLE}={text[:40]!r}. Allowed: seconds, 1 to {MAX_LIMIT_S}."
        )
    each = {name: min(seconds, limit_s / 4) for name, seconds in vars(usual).items()}
    return WaitLimits(**{**each, "post_s": min(usual.post_s, limit_s / 20), "total_s": limit_s})
