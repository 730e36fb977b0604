"""One run of several processes: a directory that rank 0 writes, and what all must have alike.

torchrun --max-restarts starts the processes again after a failure: they continue their run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora.config import RunConfig
from lora.distributed.ranks import max_restarts, restart_count
from lora.distributed.world import World
from lora.errors import ConfigError, gather
from lora.runs.directory import Run, is_taken
from lora.runs.record import RUN_FILE


@contextmanager
def shared_run(
    world: World, create: Callable[[], Run], on_message: Callable[[str], None]
) -> Iterator[Run]:
    """Open the run that `create` makes on rank 0; the other ranks' has its path and writes nothing.

    What `create` raises is raised on every rank. `on_message` gets the run's note on rank 0: that
    it has another name, or goes on with another machine or other versions.
    """
    opened: list[Run] = []

    def make() -> Path:
        opened.append(create())
        return opened[0].folder

    folder = world.on_main(make, "the run directory")
    with opened[0] if opened else Run(folder, writes=False) as run:
        if run.note:
            on_message(run.note)
        yield run


def check_is_shared(run: Run, world: World, command: str) -> None:
    """Raise ConfigError if a process does not see the directory that rank 0 has made.

    For a `command` whose other processes read or write in it.
    """
    is_seen = world.gather((run.folder / RUN_FILE).is_file(), "the run directory")
    blind = [str(rank) for rank, sees in enumerate(is_seen) if not sees]
    if blind:
        raise ConfigError(
            f"Cannot {command} on several machines: {run.folder} is not there for rank "
            f"{', '.join(blind)}, and all processes use it. Give an --out on a file system that "
            "all machines share."
        )


def check_alike(values: Mapping[str, Any], world: World) -> None:
    """Raise ConfigError if these named values differ from process to process.

    Processes that do not train the same would learn nonsense, or wait for each other for ever.
    """
    of_all = world.gather(dict(values), "settings, data and weights of every process")
    faults = [
        f"{name}: {of_all[0].get(name)} on rank 0, {other.get(name)} on rank {rank}"
        for rank, other in enumerate(of_all)
        for name in values
        if other.get(name) != of_all[0].get(name)
    ]
    if faults:
        raise ConfigError(
            gather(
                faults,
                "Cannot train together: the processes differ.",
                "Give all of them the same settings, and the same files of data and weights.",
            )
        )


def resumes(run: RunConfig, resume: bool, world: World, on_message: Callable[[str], None]) -> bool:
    """Return whether the run `run` is to be resumed: if `resume` says so, or after a restart.

    Raises ConfigError where a restart could not find the run again: it has no name, or the name is
    that of an earlier run, so that a new one would get another.
    """
    allowed, folder = max_restarts(), run.out / (run.name or "")
    if len(set(world.gather(resume, "whether the run is resumed"))) > 1:
        raise ConfigError(
            "Cannot train together: some processes resume the run, and others start it. Give all "
            "of them the same resume."
        )
    if not allowed:
        return resume
    if run.name is None:
        raise ConfigError(
            f"Cannot use torchrun --max-restarts {allowed} without a name: processes that are "
            "started again find the run by its name. Give --name, one that is not taken."
        )
    if resume:
        return True
    # Of several machines' launchers only the one whose process failed counts a restart.
    count = max(world.gather(restart_count(), "the number of restarts"))
    if count:
        is_begun = world.on_main((folder / RUN_FILE).is_file, "rank 0 to look for the run")
        if is_begun:
            on_message(f"restart {count} of {allowed}: resuming {folder}")
        return is_begun
    if world.on_main(lambda: is_taken(folder), "rank 0 to look for the run"):
        raise ConfigError(
            f"Cannot start the run {folder} under torchrun --max-restarts {allowed}: it exists, "
            "and a restart would continue it in place of this one. Give another --name, or "
            "--resume to continue it now."
        )
    return False
