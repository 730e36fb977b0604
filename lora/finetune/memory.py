"""The memory of a run: planned before the weights are read, compared with what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora.config import BaseWeights, LoRAConfig, MemoryConfig, Parallel, TrainConfig
from lora.data.prepare import PreparedData
from lora.decoder.language_model import ModelConfig
from lora.device import DeviceChoice, available_bytes, resident_bytes
from lora.distributed.world import ALONE, World
from lora.errors import ConfigError, TrainingError
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.memory.parallel import Kind, plan_parallel
from lora.fast.memory.plan import MemoryPlan, PlanInputs
from lora.fast.memory.planner import MemoryPlanner
from lora.fast.sharded.links import measure_link
from lora.fast.sharded.machines import machine_devices, machine_world
from lora.runs.disk import reading
from lora.runs.read_record import read_run_record
from lora.runs.record import RUN_FILE, MemoryResult, PlannedMemory
from lora.terminal import silent
from lora.training.out_of_memory import advise, describe_parts

MAX_OVERCOMMIT = 1.5
"""Planned / free memory of a CPU: plans are a few percent off, and there may be swap."""

CAPTURE_BYTES = 1_500_000_000
"""What a captured step takes beside its buffers: graphs, code that CUDA loads when it is first
called, and workspaces of the streams that rehearse and capture. Outside the allocator 0.6 GB of it
were measured at 70B, 0.2 GB at 8B and below (docs/memory.md); the rest is a margin."""

LAUNCHED_BYTES = 500_000_000
"""The same of a step that is not captured, as that over sharded weights: code and workspaces."""

ADAPTER_LOGS = ("lora.adapters.apply", "lora.adapters.experts")
"""Loggers of what is said of a model when LoRA is applied to it, for a plan too."""


@dataclass(frozen=True)
class RunMemory:
    """A run's memory: planned before the weights were read, measured at its end."""

    plan: MemoryPlan
    measured_bytes: int
    """The allocator's peak on a GPU; on a CPU the peak of the whole process's resident memory."""

    @property
    def error_fraction(self) -> float:
        """Planned / measured − 1: below zero where too little was planned."""
        return self.plan.total / self.measured_bytes - 1

    def describe(self) -> str:
        """Return one line for the user."""
        percent = 100 * self.error_fraction
        side = "more" if percent > 0 else "less"
        return (
            f"memory: {self.plan.total / 1e9:.2f} GB planned, {self.measured_bytes / 1e9:.2f} GB "
            f"measured ({abs(percent):.0f} % {side} was planned than needed)"
        )

    def to_record(self) -> MemoryResult:
        """Return what result.json holds of it."""
        return MemoryResult(
            measured_bytes=self.measured_bytes,
            error_fraction=round(self.error_fraction, 4),
            planned=PlannedMemory(**self.plan.to_dict()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as values that JSON holds."""
        return asdict(self.to_record())


@dataclass
class ChosenMemory:
    """The plan of a run, and leaner ones for a first step that runs out of memory."""

    planner: MemoryPlanner
    plan: MemoryPlan
    may_change: bool
    """Whether the mode is ours to choose: no user named it, and no earlier part of the run had
    it."""
    parallel: Kind | None = None
    """How several processes train the model; None for one alone."""
    parallel_reason: str = ""
    """The same in one line, with the reason."""
    world: World = ALONE
    """The processes, which all take the same plan."""
    ran_out: tuple[str, ...] = ()
    """What ran out of memory before `plan`, in words."""
    on_change: Callable[[], None] = lambda: None
    """Called when `plan` has become another."""
    on_message: Callable[[str], None] = lambda message: None

    def take_leaner(self) -> ActivationCheckpointing | None:
        """Change to the next leaner plan and return what it stores; None if there is none."""
        leaner = self.planner.plan_leaner(self.plan) if self.may_change else None
        if leaner is None or leaner.checkpointing is None:
            return None
        policy = self.plan.checkpointing
        mode = "none" if policy is None else policy.mode
        self.ran_out += (f"{mode}, {self.plan.total / 1e9:.1f} GB planned",)
        self._change(
            leaner,
            f"memory ran out in the first step ({self.ran_out[-1]}), before anything was trained; "
            "trying again",
        )
        return leaner.checkpointing

    def refit(self, free_bytes: int) -> ActivationCheckpointing | None:
        """Return what to store, given the memory that is free beside weights and optimizer.

        Weights that lie there in pieces leave less than was planned with. Called by all processes
        at once; the one with the least memory decides.
        """
        free_bytes = min(self.world.gather(free_bytes, "the free memory of each device"))
        beside = LAUNCHED_BYTES if self.parallel == "fsdp" else CAPTURE_BYTES
        excess = _step_bytes(self.plan) + beside - free_bytes
        if self.may_change and excess > 0:
            leaner = self.planner.plan_leaner(self.plan, max(1, self.plan.total - excess))
            if leaner is not None:
                found = f"beside weights and optimizer {free_bytes / 1e9:.1f} GB are free"
                needed = _step_bytes(self.plan) / 1e9
                self._change(leaner, f"{found}, too little for {needed:.1f}")
        return self.plan.checkpointing

    def _change(self, plan: MemoryPlan, why: str) -> None:
        self.plan = plan
        self.on_message(f"{why}: {plan.reason}")
        self.on_change()


def _step_bytes(plan: MemoryPlan) -> int:
    """Return what a step allocates beside weights, gradients and moments."""
    return plan.activations + plan.loss + plan.other


def plan_run(
    config: ModelConfig,
    lora: LoRAConfig | None,
    train: TrainConfig,
    data: PreparedData,
    choice: DeviceChoice,
    *,
    fast: bool,
    memory: MemoryConfig,
    checkpointing: ActivationCheckpointing | None = None,
    base: BaseWeights | None = None,
    quantised_weights: frozenset[str] | None = None,
    embedding_rows: int = 0,
    world: World = ALONE,
    parallel: Parallel = "auto",
) -> ChosenMemory:
    """Return the memory of a run on these data, planned before its process loads the model.

    `checkpointing` is what a resumed run began with. All processes of `world` get the same plan,
    for the largest share of a micro-batch and the least free memory of any. Raises ConfigError for
    a mode of activation checkpointing that the run's step does not have, and for fsdp with one
    process.
    """
    sequences = data.train
    n_tokens = len(sequences) * sequences.sequence_length
    inputs = PlanInputs(
        config=config,
        lora=lora,
        micro_batch_size=world.share.largest(train.micro_batch_size),
        tokens=sequences.sequence_length,
        device_type=choice.device.type,
        compute_dtype=choice.compute_dtype,
        micro_batches=train.gradient_accumulation,
        packed=sequences.fill_fraction < 1 or len(sequences) < len(data.train_examples),
        learned_fraction=sequences.n_target_tokens / max(1, n_tokens),
        fast=fast,
        memory=memory,
        checkpointing=checkpointing,
        base=base or BaseWeights(),
        quantised_weights=quantised_weights,
        embedding_rows=embedding_rows,
        devices=world.size,
        machine_devices=None if world.is_alone else machine_devices(world),
    )
    on_gpus, free = choice.device.type == "cuda", _free_bytes(choice, world)
    # Processes that planned with a few bytes more or less could choose otherwise.
    resident = max(world.gather(resident_bytes(), "the memory of each process"))
    with silent(*ADAPTER_LOGS):  # the model that trains says what LoRA leaves out, once
        chosen = plan_parallel(
            inputs,
            parallel,
            memory,
            free,
            partial(_measure_link, inputs, choice, world) if on_gpus else None,
            None if world.is_alone else resident,
        )
    plan = chosen.plan
    # FSDP2 recomputes whole blocks on a GPU.
    allowed = ("auto", "none") if plan.recomputed_blocks is None else ("auto", "none", "full")
    if plan.step != "fast" and memory.memory not in allowed:
        raise ConfigError(
            f"Cannot use activation checkpointing (memory={memory.memory!r}): only the fast step "
            f"has it, and this run on {choice.device.type} takes the {plan.step} step. Allowed "
            f"here: {', '.join(allowed)}. To save memory in any step, raise gradient_accumulation."
        )
    if choice.device.type == "cpu":
        is_mapped = not inputs.base.is_quantised
        _check_room(plan, train, free, has_lora=lora is not None, is_mapped=is_mapped)
    return ChosenMemory(
        chosen.planner,
        plan,
        may_change=memory.memory == "auto" and checkpointing is None,
        parallel=chosen.parallel,
        parallel_reason=chosen.reason,
        world=world,
    )


def _measure_link(inputs: PlanInputs, choice: DeviceChoice, world: World) -> float:
    """Return the bytes per second at which sharded weights would arrive, of the slowest device."""
    among = world if inputs.machine_devices is None else machine_world(world)
    speed: float = min(world.gather(measure_link(among, choice.device), "the speed of all links"))
    return speed


def _free_bytes(choice: DeviceChoice, world: World) -> int | None:
    """Return the memory that each process can use, the least of all; None: not known."""
    own = available_bytes(choice.device.type)
    if own is not None and choice.device.type == "cpu":
        own //= world.local_size  # the processes of a machine share it
    known = world.gather(own, "the free memory of each process")
    return None if None in known else min(known)


def _check_room(
    plan: MemoryPlan, train: TrainConfig, free: int | None, *, has_lora: bool, is_mapped: bool
) -> None:
    """Raise TrainingError if the kernel would kill the run, which says nothing then.

    Weights that are mapped from their file, where they stay as they are, do not count.
    """
    needed = plan.total - (plan.weights if is_mapped else 0)
    if free is not None and needed > MAX_OVERCOMMIT * free:
        beside = "beside its weights " if is_mapped else ""
        raise TrainingError(
            f"Cannot train: {beside}the run takes {needed / 1e9:,.1f} GB of memory, and "
            f"{free / 1e9:,.1f} GB are free. {advise(plan, train, has_lora=has_lora)}"
        )


def describe_plan(plan: MemoryPlan) -> str:
    """Return one line for the user: the sum and its parts in GB (10⁹ bytes)."""
    where = "" if plan.devices == 1 else f" of each of {plan.devices} processes"
    return f"planned memory{where}: {describe_parts(plan)}"


def recorded_checkpointing(run: Path, n_processes: int) -> ActivationCheckpointing | None:
    """Return what a run to be resumed stored and recomputed: another choice would round otherwise.

    None where another number of processes resumes it, each with more or less of a batch.
    """
    if not (run / RUN_FILE).is_file():
        return None  # `create_run` reports what is there, and what is not
    record = read_run_record(run)
    if (record.world_size or 1) != n_processes:
        return None
    recorded = record.activation_checkpointing
    with reading(run / RUN_FILE):
        return None if recorded is None else ActivationCheckpointing.from_record(recorded)


def recorded_failures(run: Path) -> tuple[str, ...]:
    """Return what ran out of memory in a run to be resumed before its mode was found."""
    if not (run / RUN_FILE).is_file():
        return ()
    return read_run_record(run).ran_out_of_memory or ()
