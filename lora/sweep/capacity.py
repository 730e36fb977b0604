"""How many candidates of a sweep fit into memory at once.

One candidate is planned, then a stack of two; memory grows with the stack along that line. The
fast stacked step is counted as it is built, the plain one planned as `lora plan` plans a run whose
step has as many rows. A tenth of what is free is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora.decoder.decoder import Decoder, build_empty_decoder
from lora.device import DeviceChoice, available_bytes, resident_bytes
from lora.fast.choose import why_not_stacked
from lora.fast.memory.fast_step import stacked_memory
from lora.fast.memory.plan import PlanInputs, evaluation_bytes, plan_memory
from lora.stacked.apply import apply_stacked
from lora.sweep.grid import Candidate

RESERVED_FRACTION = 0.1
"""Share of the free memory that is not planned with."""
STATE_COPIES = 3
"""Of what trains, beside values, gradients and moments: a stack's gradients are gathered into one
buffer, its update is made beside it, and checkpoints are copied before they are written."""


@dataclass(frozen=True)
class StackMemory:
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
        usable_bytes = (1 - RESERVED_FRACTION) * self.free_bytes - self.shared_bytes
        return max(0, int(usable_bytes // max(1, self.each_bytes)))

    def describe(self) -> str:
        """Return it in words."""
        each, shared = self.each_bytes / 1e9, self.shared_bytes / 1e9
        if self.n_fit is None or self.free_bytes is None:
            return f"a candidate takes about {each:.2f} GB beside {shared:.2f} GB for all"
        return (
            f"about {self.n_fit} candidates fit at once: {self.free_bytes / 1e9:.2f} GB are free, "
            f"{shared:.2f} GB are for all, {each:.2f} GB for each"
        )


def plan_stack_memory(
    model: Decoder,
    candidates: Sequence[Candidate],
    rows: int,
    tokens: int,
    *,
    packed: bool,
    learned_fraction: float,
    choice: DeviceChoice,
    fast: bool = True,
) -> StackMemory:
    """Return what a stack of these candidates takes, planned for the one with the largest rank.

    `model` is loaded already; `rows` (B) and `tokens` (T) are of one candidate's micro-batch.
    `fast`: the fast stacked step may be taken.
    """
    largest = max(candidates, key=lambda c: c.lora.rank)
    setting = PlanInputs(
        config=model.config,
        lora=largest.lora,
        micro_batch_size=rows,
        tokens=tokens,
        device_type=choice.device.type,
        compute_dtype=choice.compute_dtype,
        packed=packed,
        learned_fraction=learned_fraction,
        fast=False,
    )
    is_fast = fast and _why_not_fast(model, candidates, choice) is None
    shared, each = _of_fast_step(setting) if is_fast else (0, _of_plain_step(setting))
    if choice.device.type == "cuda":
        held = torch.cuda.memory_allocated(choice.device)
        free = torch.cuda.mem_get_info(choice.device)[0] + held
        return StackMemory(max(held, shared), each, free)
    return StackMemory(resident_bytes(), each, available_bytes("cpu"))


def _why_not_fast(
    model: Decoder, candidates: Sequence[Candidate], choice: DeviceChoice
) -> str | None:
    empty = build_empty_decoder(model.config)
    stacked = apply_stacked(empty, [c.lora for c in candidates], [0] * len(candidates))
    return why_not_stacked(empty, stacked, choice)


def _of_plain_step(setting: PlanInputs) -> int:
    """Return the bytes of each candidate more."""
    one = plan_memory(setting, 0)
    two = plan_memory(replace(setting, micro_batch_size=2 * setting.micro_batch_size), 0)
    return max(0, two.total - one.total) + (4 + STATE_COPIES) * 4 * one.trained_parameters


def _of_fast_step(setting: PlanInputs) -> tuple[int, int]:
    """Return the bytes that are for all, the base among them, and those of each candidate."""
    one, two = (fast_stack_bytes(setting, n) for n in (1, 2))
    return 2 * one - two, two - one


def fast_stack_bytes(setting: PlanInputs, n_adapters: int) -> int:
    """Return what a fast stacked step of `n_adapters` like the setting's holds, evaluation too."""
    assert setting.lora is not None
    lora = replace(setting.lora, init_seed=0)
    rows, tokens = setting.micro_batch_size, setting.tokens
    held = stacked_memory(setting.config, [lora] * n_adapters, rows, tokens, packed=setting.packed)
    return held.total + evaluation_bytes(replace(setting, micro_batch_size=n_adapters * rows))
