"""Which of several processes this one is, as torchrun's environment says. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lora.errors import ConfigError
from lora.runs.interrupts import LAUNCHER_VARIABLE

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What torchrun sets for each process, beside the address of the first."""
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
"""Of the store through which the processes find each other."""
USES_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
RESTART_COUNT, MAX_RESTARTS = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


@dataclass(frozen=True)
class Ranks:
    """One process among several."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def world_size() -> int:
    """Return how many processes torchrun has started for this run; 1 without torchrun."""
    return _number("WORLD_SIZE", 1)


def is_one_of_several() -> bool:
    """Whether the environment names this process's place among several; False if only in part."""
    try:
        return world_size() > 1 and this_rank().size > 1
    except ConfigError:  # `this_rank` says so to whoever needs it
        return False


def spans_machines() -> bool:
    """Whether processes of other machines are among those of this run."""
    return is_one_of_several() and this_rank().local_size < this_rank().size


def is_main_process() -> bool:
    """Whether this process is rank 0, or not one of several."""
    return not is_one_of_several() or this_rank().rank == 0


def is_started_by_torchrun() -> bool:
    """Whether a launcher of PyTorch watches over this process, be it one of several or not."""
    return LAUNCHER_VARIABLE in os.environ


def this_rank() -> Ranks:
    """Return this process's place among those of `world_size`.

    Raises ConfigError where a variable is missing: other tools set WORLD_SIZE alone.
    """
    missing = [name for name in (*VARIABLES, *ADDRESS) if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"Cannot join the other processes: WORLD_SIZE is {world_size()}, but the environment "
            f"has no {', '.join(missing)}. Start the processes with torchrun or with --devices, or "
            "unset WORLD_SIZE to train in one."
        )
    return Ranks(*(_number(name, 0) for name in VARIABLES))


def restart_count() -> int:
    """Return how often torchrun has started these processes again after a failure."""
    return _number(RESTART_COUNT, 0)


def max_restarts() -> int:
    """Return how often torchrun would start them again (--max-restarts)."""
    return _number(MAX_RESTARTS, 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"Cannot read the environment variable {name}={text[:40]!r}: torchrun sets it to a "
            "number. Unset it, or start the processes with torchrun or with --devices."
        ) from None
