"""Our own step on several devices, through the trainer and the real loader, as a run takes it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from one_gpu.cases import Shape
from one_gpu.models import build_stream

from devices.cases import Case
from devices.profile import kernels_of, summarise
from devices.sharded import build_sharded
from devices.whole import GB, Planned, build_theirs_adapted, build_whole
from lora.config import RunConfig, TrainConfig
from lora.data.sequences.batches import BatchStream
from lora.device import DeviceChoice, choose_device, synchronize
from lora.distributed.one_run import shared_run
from lora.distributed.world import World
from lora.fast.runner import DeviceStepRunner
from lora.runs.directory import create_run
from lora.runs.disk import read_rows
from lora.runs.progress import NoProgress
from lora.training.job import TrainingJob
from lora.training.step_runner import StepRunner, TrainingState
from lora.training.trainer import train


class Printed(NoProgress):
    """Prints what a run says and each step, so that the log of a case that hangs says where."""

    def message(self, text: str) -> None:
        """Print it."""
        print(text, flush=True)

    def step(self, step: int, loss: float, rate: float, memory: int) -> None:
        """Print a line."""
        print(f"step {step}: loss {loss:.4f}, {memory / GB:.1f} GB", flush=True)


@dataclass
class Prepared:
    """A run before its first step."""

    model: Any
    steps: StepRunner
    planned: Planned
    stream: BatchStream
    config: TrainConfig
    choice: DeviceChoice


def time_ours(case: Case, world: World, smoke: bool) -> dict[str, Any]:
    """Return the time and memory of this rank's steps."""
    shape = case.sizes(smoke=smoke)
    prepared = prepare(case, shape, world, smoke=smoke)
    print(f"built: {prepared.planned.mode}", flush=True)
    # The loop saves after the last step: 96 GB in full fine-tuning of 8B.
    prepared.steps.state = _nothing  # type: ignore[method-assign]
    if not smoke:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with (
        tempfile.TemporaryDirectory() as folder,
        shared_run(world, lambda: create_run(Path(folder), "run"), print) as run,
    ):
        job = TrainingJob(
            world=world,
            model=prepared.model,
            steps=prepared.steps,
            stream=prepared.stream,
            eval_batches=list,
            train_config=prepared.config,
            run_config=RunConfig(eval_every_steps=10**6, save_every_steps=10**6),
            run=run,
            choice=prepared.choice,
            progress=Printed(),
        )
        result = train(job)
        names = ("timings.jsonl", "metrics.jsonl")
        rows, metrics = world.on_main(
            lambda: [read_rows(run.folder / name) for name in names], "what rank 0 wrote"
        )
    losses = [row["loss"] for row in metrics]
    seconds = [row["step_s"] for row in rows]
    # A step's result is read while the next one runs, so the last row's time is too short.
    timed = sorted(seconds[shape.warm_up_steps : -1])
    return {
        "step_ms": 1000 * timed[len(timed) // 2],
        "fastest_and_slowest_ms": [round(1000 * s, 2) for s in (timed[0], timed[-1])],
        "peak_gb": result.peak_memory_bytes / GB,
        **({} if smoke else {"device_gb": used_bytes() / GB}),
        "start_s": seconds[0],
        "first_and_last_loss": [round(losses[0], 4), round(losses[-1], 4)],
        "planned_gb": prepared.planned.n_bytes / GB,
        "mode": prepared.planned.mode,
        "step": "; ".join(prepared.planned.said) or about(prepared.steps),
    }


def about(steps: StepRunner) -> str:
    """Return what a step says of itself, or its kind."""
    return steps.describe() if isinstance(steps, DeviceStepRunner) else type(steps).__name__


def used_bytes() -> int:
    """Return what is in use on this process's device, by whatever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def _nothing(adapter: int = 0) -> TrainingState:
    return {}


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
    choice = choose_device("cpu" if smoke else "cuda")
    config = TrainConfig(
        steps=shape.warm_up_steps + shape.timed_steps,
        batch_size=shape.rows * world.size,
        warmup_fraction=0.0,
        learning_rate=1e-4,
        seed=0,
    )
    build = build_sharded if case.parallel == "fsdp" else build_whole
    if case.variant.startswith("theirs"):
        build = build_theirs_adapted
    model, steps, planned = build(case, shape, world, choice, config)
    stream = build_stream(shape, steps.batch_device, packed=case.is_packed, share=world.share)
    return Prepared(model, steps, planned, stream, config, choice)
