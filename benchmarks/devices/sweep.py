"""A sweep of eight candidates on one device and on several."""

from __future__ import annotations

from typing import Any

from devices.cases import Case
from lora.distributed.world import World


def time_sweep(case: Case, world: World, smoke: bool) -> dict[str, Any]:
    """Return the time of the sweep."""
    raise NotImplementedError("sweeps over several devices")
