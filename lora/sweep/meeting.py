"""A point that processes reach hours apart, because each works on something of its own.

A collective would be ended as one that hangs. Here a process looks from time to time whether the
others have come, and does what a signal asks meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from lora.distributed.world import World

MAX_APART = timedelta(days=30)
MIN_POLL_S, MAX_POLL_S = 0.005, 0.2
REPORT_AFTER_S = 60.0
"""A wait that is longer is reported, once."""


class Meeting:
    """Where the processes of `world` wait for each other as long as it takes.

    All processes make it together. One that died ends the wait of the others: LostProcessError.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._group: dist.ProcessGroup | None = None
        if not world.is_alone:
            with world.waits("all processes to start"):
                self._group = dist.new_group(backend="gloo", timeout=MAX_APART)

    def wait(
        self, what: str, is_over: Callable[[], bool], on_message: Callable[[str], None]
    ) -> bool:
        """Return True once all processes have come; False as soon as `is_over()`, without them.

        `on_message` is called with `what` this process waits for, if that takes long.
        """
        if self._world.is_alone:
            return True
        came = dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)
        assert came is not None  # this process is one of the group
        since, poll_s, is_reported = time.monotonic(), MIN_POLL_S, False
        while not came.is_completed():
            if is_over():
                return False
            if not is_reported and time.monotonic() - since > REPORT_AFTER_S:
                on_message(f"waiting for {what}")
                is_reported = True
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, MAX_POLL_S)
        with self._world.waits(what):
            came.wait()
        return True
