"""One run of several processes: a directory that rank 0 writes, and what all must have alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora.distributed.world import World
from lora.errors import ConfigError, gather
from lora.runs.directory import Run


@contextmanager
def shared_run(world: World, create: Callable[[], Run]) -> Iterator[Run]:
    """Open the run that `create` makes on rank 0; the other ranks' has its path and writes nothing.

    What `create` raises is raised on every rank.
    """
    opened: list[Run] = []

    def make() -> tuple[Path, str]:
        opened.append(create())
        return opened[0].folder, opened[0].note

    folder, note = world.on_main(make, "the run directory")
    with opened[0] if opened else Run(folder, note=note, writes=False) as run:
        yield run


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
