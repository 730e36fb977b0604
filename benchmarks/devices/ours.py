"""Our own step on several devices, through the trainer and the real loader, as a run takes it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_step import RANK, Shape, build_empty, build_model, build_stream

from devices.cases import Case
from devices.profile import kernels_of, summarise
from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, MemoryConfig, RunConfig, TrainConfig
from lora.data.sequences.batches import BatchStream
from lora.device import DeviceChoice, available_bytes, choose_device, synchronize
from lora.distributed.world import World
from lora.fast.memory.plan import MemoryPlan, MemoryPlanner, PlanInputs
from lora.fast.runner import FastStepRunner
from lora.runs.directory import create_run
from lora.runs.disk import read_rows
from lora.training.job import TrainingJob
from lora.training.step_runner import StepRunner
from lora.training.trainer import train

GB = 1e9
SMOKE_BYTES = int(8e9)
"""Where a CPU stands for a GPU."""


@dataclass
class Prepared:
    """A run before its first step."""

    model: Any
    steps: StepRunner
    stream: BatchStream
    config: TrainConfig
    choice: DeviceChoice
    plan: MemoryPlan


def time_ours(case: Case, world: World, smoke: bool) -> dict[str, Any]:
    """Return the time and memory of this rank's steps."""
    shape = case.sizes(smoke=smoke)
    prepared = prepare(case, shape, world, smoke=smoke)
    if not smoke:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, create_run(Path(folder), "run") as run:
        job = TrainingJob(
            model=prepared.model,
            steps=prepared.steps,
            stream=prepared.stream,
            eval_batches=list,
            train_config=prepared.config,
            run_config=RunConfig(eval_every_steps=10**6, save_every_steps=10**6),
            run=run,
            choice=prepared.choice,
        )
        result = train(job)
        rows = read_rows(run.folder / "timings.jsonl")
        losses = [row["loss"] for row in read_rows(run.folder / "metrics.jsonl")]
    seconds = [row["step_s"] for row in rows]
    # A step's result is read while the next one runs, so the last row's time is too short.
    timed = sorted(seconds[shape.warm_up_steps : -1])
    return {
        "step_ms": 1000 * timed[len(timed) // 2],
        "fastest_and_slowest_ms": [round(1000 * s, 2) for s in (timed[0], timed[-1])],
        "peak_gb": result.peak_memory_bytes / GB,
        "start_s": seconds[0],
        "first_and_last_loss": [round(losses[0], 4), round(losses[-1], 4)],
        "planned_gb": prepared.plan.total / GB,
        "mode": prepared.plan.reason,
    }


def profile_ours(case: Case, world: World, smoke: bool) -> dict[str, Any]:
    """Return the kernels of one step of this rank."""
    shape = case.sizes(smoke=smoke)
    prepared = prepare(case, shape, world, smoke=smoke)
    steps, stream = prepared.steps, prepared.stream

    def take(number: int) -> None:
        steps.launch(number, [next(stream)], [1e-4])
        steps.finished(wait=True)
        synchronize(prepared.choice.device)

    for number in range(1, shape.warm_up_steps + 1):
        take(number)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    if smoke:
        activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        take(shape.warm_up_steps + 1)
    return summarise(kernels_of(profile))


def prepare(case: Case, shape: Shape, world: World, *, smoke: bool) -> Prepared:
    """Return a run of this rank before its first step: planned, built and chosen."""
    if not world.is_alone:
        raise NotImplementedError("several processes on one run")
    full, fp8 = case.variant == "ours_full", "fp8" in case.variant
    choice = choose_device("cpu" if smoke else "cuda")
    config = TrainConfig(
        steps=shape.warm_up_steps + shape.timed_steps,
        batch_size=shape.rows * world.size,
        warmup_fraction=0.0,
        learning_rate=1e-4,
        seed=0,
    )
    plan = plan_case(shape, full=full, fp8=fp8, smoke=smoke)
    model = build_model(
        shape, torch.float32 if full else choice.compute_dtype, fp8=fp8, device=choice.device.type
    )
    if full:
        model.requires_grad_(True)
    else:
        apply_lora(model, lora_config())
    stream = build_stream(shape, "cpu", packed=False)
    steps = FastStepRunner(model, choice, config, checkpointing=plan.checkpointing)
    return Prepared(model, steps, stream, config, choice, plan)


def lora_config() -> LoRAConfig:
    """Return the settings of all cases' adapters."""
    return LoRAConfig(rank=RANK, alpha=2.0 * RANK, init_seed=0)


def plan_case(shape: Shape, *, full: bool, fp8: bool, smoke: bool) -> MemoryPlan:
    """Return the memory plan with --memory auto, made as `lora finetune` makes it."""
    inputs = PlanInputs(
        build_empty(shape).config, None if full else lora_config(), shape.rows, shape.tokens,
        "cuda", torch.bfloat16, packed=False, fp8=fp8,
    )  # fmt: skip
    planner = MemoryPlanner(inputs)
    free = SMOKE_BYTES if smoke else available_bytes("cuda")
    assert free is not None
    budget = planner.usable_bytes(free) / GB
    return planner.plan(memory=MemoryConfig("auto", budget))
