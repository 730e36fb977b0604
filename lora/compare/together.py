"""A comparison in several processes: who does what, and the groups that its subprocesses form.

Each process runs each stage in a subprocess of its own. The subprocesses of a stage find each other
through another port than their parents, train together and share the evaluation. Rank 0 writes.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora.distributed.ranks import USES_AGENT_STORE, world_size
from lora.runs.record import RUN_FILE

if TYPE_CHECKING:
    from lora.distributed.world import World

T = TypeVar("T")


def group_of_subprocesses(world: World) -> dict[str, str | None]:
    """Return the environment in which one subprocess of each process joins those of the others."""
    if world.is_alone:
        return {}
    port = world.on_main(_free_port, "a port for the subprocesses")
    # Their rank 0 has their store; the launcher's is that of their parents.
    return {"MASTER_PORT": str(port), USES_AGENT_STORE: None}


def agreed(function: Callable[[], T], what: str) -> T:
    """Return what `function` returns on rank 0, which alone calls it: a small value.

    For a process that has not joined the others, or has left them.
    """
    if world_size() == 1:
        return function()
    import torch

    from lora.distributed.start import joined

    with joined(torch.device("cpu")) as world:
        return world.on_main(function, what)


def is_begun(folder: Path) -> bool:
    """Return whether a run has begun in `folder`; what an earlier one left there is removed."""
    if (folder / RUN_FILE).is_file():
        return True
    shutil.rmtree(folder, ignore_errors=True)  # killed before it began
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
