"""torchrun --max-restarts: processes that are started again continue the run that they began."""

from __future__ import annotations

from collections.abc import Callable

from lora.config import RunConfig
from lora.distributed.ranks import max_restarts, restart_count
from lora.distributed.world import World
from lora.errors import ConfigError
from lora.runs.record import RUN_FILE


def resumes(run: RunConfig, resume: bool, world: World, on_message: Callable[[str], None]) -> bool:
    """Return whether the run `run` is to be resumed: if `resume` says so, or after a restart.

    Raises ConfigError where a restart could not find the run again: it has no name, or the name is
    that of an earlier run, so that a new one would get another.
    """
    allowed, count, folder = max_restarts(), restart_count(), run.out / (run.name or "")
    if not allowed:
        return resume
    if run.name is None:
        raise ConfigError(
            f"Cannot use torchrun --max-restarts {allowed} without a name: processes that are "
            "started again find the run by its name. Give --name, one that is not taken."
        )
    if resume:
        return True
    if count:
        is_begun = world.on_main(
            lambda: (folder / RUN_FILE).is_file(), "rank 0 to look for the run"
        )
        if is_begun:
            on_message(f"restart {count} of {allowed}: resuming {folder}")
        return bool(is_begun)
    is_taken = world.on_main(
        lambda: folder.exists() and (not folder.is_dir() or any(folder.iterdir())),
        "rank 0 to look for the run",
    )
    if is_taken:
        raise ConfigError(
            f"Cannot start the run {folder} under torchrun --max-restarts {allowed}: it exists, and "
            "a restart would continue it in place of this one. Give another --name, or --resume to "
            "continue it now."
        )
    return False
