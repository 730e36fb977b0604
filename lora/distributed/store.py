"""The store of a run: small values that its processes leave for each other, by name.

It is the one through which they found each other. Under torchrun it lives in the launcher and
outlives each of them; else it lives in rank 0.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from lora.distributed.ranks import USES_AGENT_STORE, restart_count

CONNECT_S = 5.0
ERROR, LOST, STATE = "error", "lost", "state"
"""Of keys: what a rank failed with, who told that one is lost, what a rank does."""


def shared_store(store: dist.Store) -> dist.Store:
    """Return a connection of its own to `store`, with names apart from PyTorch's."""
    return dist.PrefixStore(f"lora/{restart_count()}", store.clone())  # type: ignore[attr-defined]


def launcher_store() -> dist.Store | None:
    """Return the store of the launcher; None where the launcher has none, or is gone."""
    if os.environ.get(USES_AGENT_STORE) != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=CONNECT_S)
    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    except (dist.DistError, RuntimeError):
        return None
    return dist.PrefixStore(f"lora/{restart_count()}", store)


def read(store: dist.Store, kind: str, rank: int) -> str | None:
    """Return what `rank` has left; None if nothing."""
    key = f"{kind}/{rank}"
    return store.get(key).decode() if store.check([key]) else None
