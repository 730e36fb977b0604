"""Our own step on one GPU, through the trainer and the real loader, as a run takes it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_peers import LEARNING_RATE, build_theirs, peak_bytes, restart_peak

from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, RunConfig, TrainConfig
from lora.data.sequences.batches import BatchStream
from lora.device import DeviceChoice, choose_device
from lora.fast.memory.fast_step import USABLE_MEMORY_FRACTION, FastPlan, MemoryFit, fit_memory
from lora.fast.runner import CapturedStepRunner, FastStepRunner
from lora.fast.why_not import why_not_fast
from lora.layers.quantised_model import use_quantised_linears
from lora.pretrained.transformers_models.load import as_language_model
from lora.runs.directory import create_run
from lora.runs.disk import read_rows
from lora.training.job import TrainingJob
from lora.training.losses import loss_for
from lora.training.plain_step import PlainStepRunner
from lora.training.step_runner import StepRunner
from lora.training.trainer import train
from one_gpu.cases import MEMORY_GB, RANK, Shape, base_and_mode
from one_gpu.models import build_empty, build_model, build_stream

PACKED_DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


def time_ours(shape: Shape, variant: str) -> dict[str, Any]:
    """Return the time and memory of a run through the trainer."""
    choice = choose_device(shape.device)
    fit = None if variant == "ours_full" else fit_mode(shape, variant)
    restart_peak(shape.device)
    began_s = time.perf_counter()
    model = build_adapted(shape, variant, choice.compute_dtype)
    plain, packed = variant.endswith("plain"), variant.endswith("packed")
    device = choice.device if plain else "cpu"  # where `batch_device` of its steps will be
    stream = build_stream(shape, device, packed=packed, n_batches=64 if packed else 1)
    built_bytes = peak_bytes(shape.device)
    restart_peak(shape.device)
    built_s = time.perf_counter()
    config = TrainConfig(
        steps=shape.warm_up_steps + shape.timed_steps,
        batch_size=shape.rows,
        warmup_fraction=0.0,
        learning_rate=LEARNING_RATE,
        seed=0,
    )
    steps = build_steps(model, choice, variant, fit, config)
    seconds, losses, peak = run_trainer(model, choice, steps, stream, config)
    # A step's result is read while the next one runs, so the last row's time is too short.
    timed = sorted(seconds[shape.warm_up_steps : -1])
    packed_weights = [p for p in model.parameters() if p.dtype in PACKED_DTYPES]
    return {
        "step_ms": 1000 * timed[len(timed) // 2],
        "peak_gb": (peak or peak_bytes(shape.device)) / 1e9,
        "start_s": seconds[0],
        "build_s": built_s - began_s,
        "build_peak_gb": built_bytes / 1e9,
        "first_and_last_loss": [round(losses[0], 4), round(losses[-1], 4)],
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "packed_linears": len(packed_weights),
        **({} if fit is None else {"planned_gb": fit.memory.total / 1e9, "mode": fit.reason}),
    }


def build_adapted(shape: Shape, variant: str, dtype: torch.dtype) -> Any:
    """Return the model of one of our variants, with the adapters or weights that train."""
    if variant == "ours_full":
        return build_model(shape, torch.float32, device=shape.device).requires_grad_(True)
    model: Any
    if variant.startswith("theirs"):
        model = as_language_model(build_theirs(shape, dtype=dtype))
    else:
        base, _ = base_and_mode(variant)
        model = build_model(shape, dtype, base=base, device=shape.device)
    return apply_lora(model, LoRAConfig(rank=RANK, alpha=2.0 * RANK, init_seed=0))


def run_trainer(
    model: Any, choice: DeviceChoice, steps: StepRunner, stream: BatchStream, config: TrainConfig
) -> tuple[list[float], list[float], int]:
    """Return the seconds and losses of the steps of a run, and its peak of memory in bytes."""
    with tempfile.TemporaryDirectory() as folder, create_run(Path(folder), "run") as run:
        job = TrainingJob(
            model=model,
            steps=steps,
            stream=stream,
            eval_batches=list,
            train_config=config,
            run_config=RunConfig(eval_every_steps=10**6, save_every_steps=10**6),
            run=run,
            choice=choice,
        )
        result = train(job)
        seconds = [row["step_s"] for row in read_rows(run.folder / "timings.jsonl")]
        losses = [row["loss"] for row in read_rows(run.folder / "metrics.jsonl")]
    return seconds, losses, result.peak_memory_bytes


def fit_mode(shape: Shape, variant: str) -> MemoryFit | None:
    """Return which activations a variant of the fast step stores, recomputes or offloads."""
    base, kind = base_and_mode(variant)
    if not variant.startswith("ours_lora") or kind in ("_captured", "_plain"):
        return None
    model = build_empty(shape).to(torch.bfloat16 if shape.device == "cuda" else torch.float32)
    use_quantised_linears(model, base)
    apply_lora(model, LoRAConfig(rank=RANK, alpha=2.0 * RANK, init_seed=0))
    is_packed = kind == "_packed"
    plan = FastPlan(model, shape.rows, shape.tokens, packed=is_packed)
    if kind in ("", "_packed"):
        return fit_memory(plan, "none", None)
    free = torch.cuda.mem_get_info()[0] if shape.device == "cuda" else 10**12
    budget = free * USABLE_MEMORY_FRACTION
    if variant in MEMORY_GB:
        budget = MEMORY_GB[variant] * 1e9
    return fit_memory(plan, "full+offload" if kind == "_offload" else kind[1:], int(budget))


def build_steps(
    model: Any, choice: DeviceChoice, variant: str, fit: MemoryFit | None, config: TrainConfig
) -> StepRunner:
    """Return the step runner of one of our variants."""
    if variant.endswith("plain"):
        return PlainStepRunner(model, loss_for(model), choice, config)
    if "captured" in variant or "compiled" in variant:
        compiles = "compiled" in variant
        return CapturedStepRunner(model, choice, config, compiles=compiles)
    # The kernels' plain twins run on a CPU, which no run chooses.
    why_not = why_not_fast(model, choice) if choice.device.type == "cuda" else None
    assert why_not is None, why_not
    checkpointing = None if fit is None else fit.checkpointing
    return FastStepRunner(model, choice, config, checkpointing=checkpointing)
