"""The store of a run: small values that its processes leave for each other, by name.

It is the one through which they found each other. Under torchrun it lives in the launcher and
outlives each of them; else it lives in rank 0.

Processes that are started again must not read what earlier ones left. On one machine torchrun's
count of restarts distinguishes them. On several machines that count differs after a failure: only
the launcher whose process failed counts it. So there all processes first agree on a name.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from lora.distributed.ranks import USES_AGENT_STORE, restart_count, this_rank
from lora.errors import LostProcessError

CONNECT_S, POLL_S = 5.0, 0.05
MEETING = "lora-meeting"
ERROR, LOST, STATE = "error", "lost", "state"
"""Of keys: what a rank failed with, who told that one is lost, what a rank does."""


_agreed: list[str] = []
"""The name that this process has agreed on with those of other machines."""


def shared_store(store: dist.Store) -> dist.Store:
    """Return a connection of its own to `store`, with names apart from PyTorch's."""
    return dist.PrefixStore(_prefix(), store.clone())  # type: ignore[attr-defined]


def launcher_store() -> dist.Store | None:
    """Return the store of the launcher; None where the launcher has none, or is gone."""
    store = _launcher(CONNECT_S)
    return None if store is None else dist.PrefixStore(_prefix(), store)


def meeting_store(limit_s: float) -> dist.Store:
    """Return the store in which the processes of this start leave their addresses.

    Raises LostProcessError if those of other machines do not come within `limit_s`.
    """
    here, limit = this_rank(), timedelta(seconds=limit_s)
    launcher = _launcher(limit_s) if here.local_size < here.size else None
    if launcher is None:
        store: dist.Store = next(dist.rendezvous("env://", timeout=limit))[0]
        return store
    meeting = dist.PrefixStore(MEETING, launcher)
    _agreed[:] = [agree(meeting, here.rank, here.size, limit_s)]
    return dist.PrefixStore(f"{MEETING}/{_agreed[0]}", launcher)


def start_name() -> str:
    """Return what tells this start of the processes from earlier ones."""
    return _agreed[0] if _agreed else str(restart_count())


def agree(store: dist.Store, rank: int, size: int, limit_s: float) -> str:
    """Return a name that all processes of this start have, and none of an earlier one.

    Rank 0 makes it; each other process answers it with a name of its own until it finds that among
    the answers that rank 0 accepted. What dead processes have left is no answer to a new name.
    """
    own, until_s = uuid.uuid4().hex, time.monotonic() + limit_s
    missing = list(range(1, size)) if rank == 0 else [0]
    if rank == 0:
        store.set("name", own)
    while time.monotonic() < until_s:
        if rank == 0:
            answers = {other: _answer(store, other, own) for other in range(1, size)}
            missing = [other for other, answer in answers.items() if answer is None]
            if not missing:
                store.set(f"accepted/{own}", json.dumps(list(answers.values())))
                return own
        elif store.check(["name"]):
            name = store.get("name").decode()
            write(store, "answer", rank, f"{name} {own}")
            accepted = f"accepted/{name}"
            if store.check([accepted]) and own in json.loads(store.get(accepted)):
                return name
        time.sleep(POLL_S)
    ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:8]))}"
    raise LostProcessError(
        f"Cannot start: {ranks} did not come within {limit_s:.0f} s. Start the command on every "
        "machine, with the same sizes and the same address."
    )


def _answer(store: dist.Store, rank: int, name: str) -> str | None:
    """Return what `rank` has answered to `name`; None if nothing."""
    text = read(store, "answer", rank)
    asked, _, answer = (text or "").partition(" ")
    return answer if asked == name else None


def _launcher(limit_s: float) -> dist.Store | None:
    if os.environ.get(USES_AGENT_STORE) != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=limit_s)
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    except (dist.DistError, RuntimeError):
        return None


def _prefix() -> str:
    return f"lora/{start_name()}"


def write(store: dist.Store, kind: str, rank: int, text: str) -> None:
    """Leave `text` in the name of `rank`, in place of what it left before."""
    store.set(f"{kind}/{rank}", text)


def read(store: dist.Store, kind: str, rank: int) -> str | None:
    """Return what `rank` has left; None if nothing."""
    key = f"{kind}/{rank}"
    return store.get(key).decode() if store.check([key]) else None
