"""Plans how many candidates of a sweep fit into memory at once.

Memory is planned for one candidate and for a stack of two, and taken to be linear in the size of
the stack. For the fast stacked step the buffers that it allocates are counted; the plain step is
planned as `lora plan` plans a run with the stack's batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora.config import BaseWeights
from lora.decoder.language_model import LanguageModel
from lora.device import DeviceChoice, available_bytes, resident_bytes
from lora.fast.memory.fast_step import stacked_memory
from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.planner import MemoryPlanner, evaluation_bytes
from lora.fast.why_not import why_not_stacked
from lora.pretrained.load.models import (
    as_decoder_config,
    empty_language_model,
    quantise_empty_model,
)
from lora.stacked.apply import apply_stacked
from lora.sweep.grid import Candidate

RESERVED_FRACTION = 0.1
"""Of the free memory: kept in reserve, because a plan is an estimate."""
STATE_COPIES = 4
"""Copies of the trained parameters that the plain step of a stack holds beside values, gradients
and moments: the gathered gradients, the update, the copy that a checkpoint is written from, and the
best values."""


@dataclass(frozen=True)
class StackMemory:
    """Memory of a stack of candidates, in bytes."""

    shared_bytes: int
    """The frozen base and what the process holds besides."""
    each_bytes: int
    """What each candidate adds."""
    free_bytes: int | None
    """What this process may allocate in all; None where it is not known."""

    @property
    def n_fit(self) -> int | None:
        """How many candidates fit at once; None where it is not known."""
        if self.free_bytes is None:
            return None
        usable_bytes = (1 - RESERVED_FRACTION) * self.free_bytes - self.shared_bytes
        return max(0, int(usable_bytes // max(1, self.each_bytes)))

    def describe(self) -> str:
        """Return the plan in words."""
        each, shared = self.each_bytes / 1e9, self.shared_bytes / 1e9
        if self.n_fit is None or self.free_bytes is None:
            return f"a candidate takes about {each:.2f} GB, beside {shared:.2f} GB that all share"
        return (
            f"about {self.n_fit} candidates fit at once: {self.free_bytes / 1e9:.2f} GB are free, "
            f"{shared:.2f} GB are shared, {each:.2f} GB for each candidate"
        )


def plan_stack_memory(
    model: LanguageModel,
    candidates: Sequence[Candidate],
    micro_batch_size: int,
    tokens: int,
    *,
    packed: bool,
    learned_fraction: float,
    choice: DeviceChoice,
    fast: bool = True,
    processes_here: int = 1,
    base: BaseWeights | None = None,
    quantised_weights: frozenset[str] | None = None,
) -> StackMemory:
    """Return the memory of a stack of these candidates, planned for the one with the largest rank.

    Args:
        model: the base, already loaded.
        candidates: of the sweep.
        micro_batch_size: of one candidate, B.
        tokens: of one sequence, T.
        packed: whether sequences are packed from several documents.
        learned_fraction: of the tokens, those with a target in the loss.
        choice: where it runs.
        fast: whether the fast stacked step may be taken.
        processes_here: which share the memory of this machine's CPU.
        base: how the model's frozen linears are stored; None: in the compute dtype.
        quantised_weights: names of those that are stored so; None: all of the blocks' linears.
    """
    largest = max(candidates, key=lambda c: c.lora.rank)
    setting = PlanInputs(
        config=model.config,
        lora=largest.lora,
        micro_batch_size=micro_batch_size,
        tokens=tokens,
        device_type=choice.device.type,
        compute_dtype=choice.compute_dtype,
        packed=packed,
        learned_fraction=learned_fraction,
        fast=False,
        base=base or BaseWeights(),
        quantised_weights=quantised_weights,
    )
    # Asked in any case: what no step can stack is refused here, before anything is written.
    why_not = _why_not_fast(setting, candidates, choice)
    is_fast = fast and why_not is None
    shared, each = _fast_step_bytes(setting) if is_fast else (0, _plain_step_bytes(setting))
    if choice.device.type == "cuda":
        allocated = torch.cuda.memory_allocated(choice.device)  # the base
        free = torch.cuda.mem_get_info(choice.device)[0] + allocated
        return StackMemory(max(allocated, shared), each, free)
    own, free_here = resident_bytes(), available_bytes("cpu")
    if free_here is not None:
        free_here = own + (free_here - own) // processes_here
    return StackMemory(own, each, free_here)


def _why_not_fast(
    setting: PlanInputs, candidates: Sequence[Candidate], choice: DeviceChoice
) -> str | None:
    empty = empty_language_model(setting.config)
    quantise_empty_model(empty, setting.base, setting.quantised_weights)
    stacked = apply_stacked(empty, [c.lora for c in candidates], [0] * len(candidates))
    return why_not_stacked(empty, stacked, choice)


def _plain_step_bytes(setting: PlanInputs) -> int:
    """Return the bytes that each candidate adds."""
    planner = MemoryPlanner(setting, 0)
    one, two = planner.plan(), planner.plan(2 * setting.micro_batch_size)
    # Values, gradients and two moments in fp32, then the copies: the plan with twice the batch size
    # counts the activations of two candidates, but the trained parameters of one.
    return max(0, two.total - one.total) + (4 + STATE_COPIES) * 4 * one.trained_parameters


def _fast_step_bytes(setting: PlanInputs) -> tuple[int, int]:
    """Return the bytes that all candidates share, the base among them, and those of each."""
    one, two = (fast_stack_bytes(setting, n) for n in (1, 2))
    return 2 * one - two, two - one


def fast_stack_bytes(setting: PlanInputs, n_adapters: int) -> int:
    """Return the bytes of a fast stacked step of `n_adapters` adapters, evaluation included."""
    assert setting.lora is not None
    lora = replace(setting.lora, init_seed=0)
    batch_size, tokens = setting.micro_batch_size, setting.tokens
    step = stacked_memory(
        as_decoder_config(setting.config),
        [lora] * n_adapters,
        batch_size,
        tokens,
        packed=setting.packed,
        base=setting.base,
        quantised_weights=setting.quantised_weights,
    )
    stacked = replace(setting, micro_batch_size=n_adapters * batch_size)
    return step.total + evaluation_bytes(stacked)
