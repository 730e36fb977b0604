"""The speed of the links between devices, and memory that several processes agree on."""

from __future__ import annotations

import torch

from lora.distributed.world import World
from lora.fast.sharded.links import measure_link
from tests.distributed.processes import run_processes


def _measure(world: World) -> float:
    return measure_link(world, torch.device("cpu"), n_bytes=2**16)


def test_every_process_gets_the_speed_of_the_slowest() -> None:
    first, second = run_processes(2, _measure)
    assert first == second > 0
