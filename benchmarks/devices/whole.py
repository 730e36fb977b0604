"""The model of a case, whole in every process; what every case's model has alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_peers import build_theirs
from one_gpu.cases import RANK, Shape
from one_gpu.models import build_empty, build_model

from devices.cases import Case
from lora.adapters.apply import apply_lora
from lora.config import LoRAConfig, MemoryConfig, TrainConfig
from lora.device import DeviceChoice, available_bytes
from lora.distributed.world import World
from lora.fast.choose import PlannedStep, choose_steps
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.planner import MemoryPlanner
from lora.fast.runner import CapturedStepRunner, FastStepRunner
from lora.fast.why_not import why_not_hand_written
from lora.pretrained.transformers_models.load import as_language_model
from lora.training.step_runner import StepRunner

GB = 1e9
SMOKE_BYTES = int(8e9)
"""Where a CPU stands for a GPU."""


@dataclass(frozen=True)
class Planned:
    """What a step was planned to hold on this rank's device, and what it says."""

    n_bytes: int
    mode: str
    """Of activation checkpointing, with the reason."""
    checkpointing: ActivationCheckpointing | None
    said: list[str] = field(default_factory=list)
    """What the step has said of itself."""


def lora_config() -> LoRAConfig:
    """Return the settings of all cases' adapters."""
    return LoRAConfig(rank=RANK, alpha=2.0 * RANK, init_seed=0)


def build_whole(
    case: Case, shape: Shape, world: World, choice: DeviceChoice, config: TrainConfig
) -> tuple[Any, StepRunner, Planned]:
    """Return a model that every process has whole, its step and its plan."""
    fit = plan_case(case, shape, is_cuda=choice.device.type == "cuda")
    dtype = torch.float32 if case.is_full else choice.compute_dtype
    model = build_model(shape, dtype, base=case.base, device=choice.device.type)
    if case.is_full:
        model.requires_grad_(True)
    else:
        apply_lora(model, lora_config())
    steps: StepRunner
    if choice.device.type == "cuda" or why_not_hand_written(model) is not None:
        steps = choose_steps(
            model,
            choice,
            config,
            planned=PlannedStep(fit.checkpointing),
            on_message=fit.said.append,
            world=world,
        )
    else:  # the fast step's plain twins: a run on a CPU would not choose them
        steps = FastStepRunner(model, choice, config, checkpointing=fit.checkpointing, world=world)
    return model, steps, fit


def build_theirs_adapted(
    case: Case, shape: Shape, world: World, choice: DeviceChoice, config: TrainConfig
) -> tuple[Any, StepRunner, Planned]:
    """Return transformers' model with our LoRA, and on a GPU our captured step, compiled or not."""
    model = as_language_model(build_theirs(shape, choice.device, choice.compute_dtype))
    apply_lora(model, lora_config())
    none = Planned(0, "", None)
    if choice.device.type != "cuda":
        return model, choose_steps(model, choice, config, world=world), none
    compiles = case.variant.endswith("compiled")
    return model, CapturedStepRunner(model, choice, config, compiles=compiles, world=world), none


def plan_case(case: Case, shape: Shape, *, is_cuda: bool) -> Planned:
    """Return the memory plan with --memory auto, made as `lora finetune` makes it."""
    planner = planner_of(case, shape)
    free = (available_bytes("cuda") or 0) if is_cuda else SMOKE_BYTES
    plan = planner.plan(memory=MemoryConfig("auto", planner.usable_bytes(free) / GB))
    return Planned(plan.total, plan.reason, plan.checkpointing)


def planner_of(case: Case, shape: Shape) -> MemoryPlanner:
    """Return what plans the memory of one of the case's devices."""
    inputs = PlanInputs(
        build_empty(shape).config,
        None if case.is_full else lora_config(),
        shape.rows,
        shape.tokens,
        "cuda",
        torch.bfloat16,
        packed=case.is_packed,
        base=case.base,
        devices=case.devices,
        parallel="fsdp" if case.parallel == "fsdp" else "ddp",
    )
    return MemoryPlanner(inputs)
