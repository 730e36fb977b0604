"""How several devices train one model: ddp, where each has all weights, or fsdp, where each has a
share of them.

ddp exchanges a few megabytes of gradients a step, fsdp all weights twice. Where the next block's
weights arrive while this one computes, that costs nothing, and fsdp's free memory can store
activations that ddp would have to recompute. So ddp is taken unless it does not fit, or unless it
recomputes more than fsdp and the exchange can be hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from lora.config import MemoryConfig, Parallel
from lora.decoder.config import DecoderConfig
from lora.errors import ConfigError
from lora.fast.memory.plan import MemoryPlan, PlanInputs
from lora.fast.memory.planner import MemoryPlanner

Kind = Literal["ddp", "fsdp"]
MIN_LINK_BYTES_PER_S = 100e9
"""From which on weights arrive as fast as they are used. NVLink has 150 GB/s and more, PCIe at most
64, and a network between machines less."""
MIN_HIDDEN_TOKENS = 2048
"""Of a device's micro-batch: with fewer, a weight takes longer to arrive than its matmul does. On
an H100 2 bytes arrive in 6.7 ps (300 GB/s), in which 2 FLOPs are done for 2,300 tokens (700
TFLOP/s, bf16); fp8 has half the bytes and twice the rate."""
STORED, GATE_UP, BLOCKS, OFFLOADED, DOES_NOT_FIT = range(5)
"""What a plan recomputes: no matmul, gate and up of some blocks, whole blocks, whole blocks with
their inputs in host memory; or it does not fit."""


@dataclass(frozen=True)
class ParallelPlan:
    """The plan of one of several devices, and why it is ddp's or fsdp's."""

    planner: MemoryPlanner
    plan: MemoryPlan
    memory: MemoryConfig
    """What was planned with: its budget is that of one device, where it is known."""
    reason: str = ""
    """One line; empty for a process alone."""

    @property
    def parallel(self) -> Kind | None:
        """The choice; None for a process alone."""
        inputs = self.planner.inputs
        return None if inputs.devices == 1 else inputs.parallel

    @property
    def recomputes(self) -> int:
        """STORED to DOES_NOT_FIT."""
        budget_gb, stored = self.memory.memory_gb, self.plan.checkpointing
        if budget_gb is not None and self.plan.total > round(budget_gb * 1e9):
            return DOES_NOT_FIT
        if stored is None or stored.mode == "none":
            return BLOCKS if self.plan.recomputed_blocks else STORED
        if stored.mode == "cheap":
            n_layers = self.planner.inputs.config.num_hidden_layers
            return GATE_UP if stored.n_stored(n_layers)[0] < n_layers else STORED
        return BLOCKS if stored.mode == "full" else OFFLOADED


def check_parallel(parallel: Parallel, devices: int) -> None:
    """Raise ConfigError if one process was asked to shard weights."""
    if parallel == "fsdp" and devices == 1:
        raise ConfigError(
            "Cannot use parallel='fsdp' with one process: weights are sharded over several. "
            "Allowed: auto, ddp. Give --devices N, or start the run with torchrun."
        )


def plan_parallel(
    inputs: PlanInputs,
    parallel: Parallel,
    memory: MemoryConfig,
    free_bytes: int | None,
    link_bytes_per_s: Callable[[], float] | None = None,
    base_bytes: int | None = None,
) -> ParallelPlan:
    """Return the plan of a run on `inputs.devices` devices, with the kind of parallelism chosen.

    Args:
        inputs: of one device; their `parallel` and `memory` are replaced.
        parallel: what the user asked for.
        memory: the mode and the budget that the user asked for.
        free_bytes: of each device, the least of all; None: not known.
        link_bytes_per_s: measures how fast a device receives from the others, if that decides; None
            where nothing can be measured: fast enough.
        base_bytes: of MemoryPlanner.

    Raises ConfigError for fsdp with one process, and what MemoryPlanner raises.
    """
    check_parallel(parallel, inputs.devices)

    def planned(kind: Kind) -> ParallelPlan:
        wanted = replace(inputs, parallel=kind, memory=memory)
        found = plan_within(MemoryPlanner(wanted, base_bytes), memory, free_bytes)
        if kind == "ddp" or inputs.machine_devices is None or found.recomputes != DOES_NOT_FIT:
            return found
        # Where a machine cannot hold all weights, they have to cross the network.
        wanted = replace(wanted, machine_devices=None)
        return plan_within(MemoryPlanner(wanted, base_bytes), memory, free_bytes)

    if inputs.devices == 1:
        return planned("ddp")
    if parallel != "auto":
        return _explained(planned(parallel), "as asked")
    ddp = planned("ddp")
    if not isinstance(inputs.config, DecoderConfig):
        return _explained(ddp, "only native decoders can be sharded")
    if inputs.base.nf4_embeddings:
        return _explained(ddp, "an embedding and a head in nf4 are not sharded")
    if ddp.recomputes == STORED:
        return choose_parallel(ddp, ddp)
    return choose_parallel(ddp, planned("fsdp"), link_bytes_per_s)


def plan_within(
    planner: MemoryPlanner, memory: MemoryConfig, free_bytes: int | None
) -> ParallelPlan:
    """Return the plan of a device with `free_bytes`, or with the budget in `memory`."""
    if memory.memory_gb is None and free_bytes is not None:
        memory = replace(memory, memory_gb=planner.usable_bytes(free_bytes) / 1e9)
    return ParallelPlan(planner, planner.plan(memory=memory), memory)


def choose_parallel(
    ddp: ParallelPlan, fsdp: ParallelPlan, link_bytes_per_s: Callable[[], float] | None = None
) -> ParallelPlan:
    """Return one of two plans for the same devices, with its reason.

    `link_bytes_per_s` is called if it decides, in every process at the same point.
    """
    if ddp.recomputes == STORED:
        known = ddp.memory.memory_gb is not None
        unknown = "the memory of a device is not known"
        return _explained(ddp, "all weights fit on each" if known else unknown)
    if ddp.recomputes == DOES_NOT_FIT:
        if fsdp.recomputes == DOES_NOT_FIT:
            smaller = min(ddp, fsdp, key=lambda one: one.plan.total)
            return _explained(smaller, "neither ddp nor fsdp fits, and this is the smaller one")
        needed, budget_gb = ddp.plan.total / 1e9, ddp.memory.memory_gb
        why = f"all weights on each would take {needed:.1f} GB of {budget_gb:.1f}"
        return _explained(fsdp, why)
    what = "gate and up" if ddp.recomputes == GATE_UP else "whole blocks"
    if fsdp.recomputes >= ddp.recomputes:
        return _explained(ddp, f"all weights fit on each, and fsdp would recompute {what} too")
    inputs = ddp.planner.inputs
    if inputs.micro_batch_size * inputs.tokens < MIN_HIDDEN_TOKENS:
        few = f"fewer than {MIN_HIDDEN_TOKENS:,} tokens of each would hide no exchange of weights"
        return _explained(ddp, f"all weights fit on each, and {few}")
    if link_bytes_per_s is not None and (speed := link_bytes_per_s()) < MIN_LINK_BYTES_PER_S:
        slow = f"weights would arrive at {speed / 1e9:.0f} GB/s, slower than they are used"
        return _explained(ddp, f"all weights fit on each, and {slow}")
    return _explained(fsdp, f"with all weights on each, {what} would have to be recomputed")


def _explained(chosen: ParallelPlan, why: str) -> ParallelPlan:
    inputs, budget_gb = chosen.planner.inputs, chosen.memory.memory_gb
    of = "" if budget_gb is None else f" of {budget_gb:.1f}"
    planned = f"; {chosen.plan.total / 1e9:.1f} GB{of} planned on each"
    said = "" if chosen.plan.reason else planned  # the plan's own reason says it
    return replace(chosen, reason=f"{inputs.devices} devices, {inputs.parallel}: {why}{said}")
