"""How many candidates of a sweep fit into memory at once.

One candidate is planned as `lora plan` plans a run with the plain step, then a stack of two, whose
step has twice the rows; memory grows with the stack along that line. A tenth of what is free is
left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice, available_bytes, resident_bytes
from lora.plan import Setting, plan_memory
from lora.sweep_grid import Candidate

SPARED = 0.1
"""Share of the free memory that is not planned with."""
STATE_COPIES = 3
"""Of what trains, beside values, gradients and moments: a stack's gradients are gathered into one
buffer, its update is made beside it, and checkpoints are copied before they are written."""


@dataclass(frozen=True)
class Room:
    """Memory of a stack of candidates, in bytes."""

    shared_bytes: int
    """The frozen base and what the process holds."""
    each_bytes: int
    """More for each candidate."""
    free_bytes: int | None
    """What a run of this process may hold; None where it cannot be known."""

    @property
    def n_fit(self) -> int | None:
        """How many candidates fit at once; None where it cannot be known."""
        if self.free_bytes is None:
            return None
        room = (1 - SPARED) * self.free_bytes - self.shared_bytes
        return max(0, int(room // max(1, self.each_bytes)))

    def describe(self) -> str:
        """Return it in words."""
        each, shared = self.each_bytes / 1e9, self.shared_bytes / 1e9
        if self.n_fit is None or self.free_bytes is None:
            return f"a candidate takes about {each:.2f} GB beside {shared:.2f} GB for all"
        return (
            f"about {self.n_fit} candidates fit at once: {self.free_bytes / 1e9:.2f} GB are free, "
            f"{shared:.2f} GB are for all, {each:.2f} GB for each"
        )


def find_room(
    model: Decoder,
    candidates: Sequence[Candidate],
    rows: int,
    tokens: int,
    *,
    packed: bool,
    learned_fraction: float,
    choice: DeviceChoice,
) -> Room:
    """Return what a stack of these candidates takes, planned for the one with the largest rank.

    `model` is loaded already; `rows` (B) and `tokens` (T) are of one candidate's micro-batch.
    """
    largest = max(candidates, key=lambda c: c.lora.rank)
    setting = Setting(
        config=model.config,
        lora=largest.lora,
        rows=rows,
        tokens=tokens,
        device_type=choice.device.type,
        compute_dtype=choice.compute_dtype,
        packed=packed,
        learned_fraction=learned_fraction,
        fast=False,
    )
    one = plan_memory(setting, 0)
    two = plan_memory(replace(setting, rows=2 * rows), 0)
    trained = 4 * one.trained_parameters
    each = max(0, two.total - one.total) + (4 + STATE_COPIES) * trained
    if choice.device.type == "cuda":
        held = torch.cuda.memory_allocated(choice.device)
        free = torch.cuda.mem_get_info(choice.device)[0] + held
        return Room(held, each, free)
    return Room(resident_bytes(), each, available_bytes("cpu"))
