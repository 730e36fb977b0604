"""Our sharded step over random weights: each process draws the rows of its shard on its GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from one_gpu.cases import Shape
from one_gpu.models import build_empty
from torch import Tensor

from devices.cases import Case
from devices.whole import Planned, lora_config, plan_case
from lora.adapters.apply import apply_lora, lora_layers
from lora.config import TrainConfig
from lora.decoder.decoder import Decoder
from lora.device import DeviceChoice
from lora.distributed.shards import Rows
from lora.distributed.world import World
from lora.fast.choose import PlannedStep, choose_steps
from lora.fast.runner import FastStepRunner
from lora.fast.sharded.base import ShardedBase
from lora.layers.quantised_model import use_quantised_linears
from lora.training.step_runner import StepRunner

SPREAD = 0.02


def build_sharded(
    case: Case, shape: Shape, world: World, choice: DeviceChoice, config: TrainConfig
) -> tuple[Any, StepRunner, Planned]:
    """Return a model of which every process has its rows, its step and its plan."""
    full, is_cuda = case.is_full, choice.device.type == "cuda"
    planned = plan_case(case, shape, is_cuda=is_cuda)
    print("planned", flush=True)
    model = empty_model(shape, torch.float32 if full else choice.compute_dtype, case)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    rows = random_rows(shapes, choice.device)
    if not full:
        fill_adapters(model, choice)
    stored, say = planned.checkpointing, planned.said.append
    if full or is_cuda:
        steps = choose_steps(
            model,
            choice,
            config,
            planned=PlannedStep(stored),
            on_message=say,
            world=world,
            rows=rows,
        )
        return model, steps, planned
    # On a CPU no run chooses the hand-written step: its plain twins are taken by name.
    base = ShardedBase(rows, choice.device, world)
    fast = FastStepRunner(model, choice, config, checkpointing=stored, world=world, base=base)
    return model, fast, planned


def fill_adapters(model: Decoder, choice: DeviceChoice) -> None:
    """Changes `model` in place: LoRA's A and B exist, the same in every process."""
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        a, b = layer.lora_A, layer.lora_B
        layer.lora_A = torch.nn.Parameter(SPREAD * _drawn(a.shape, a.dtype, choice.device))
        layer.lora_B = torch.nn.Parameter(torch.zeros_like(b, device=choice.device))


def empty_model(shape: Shape, dtype: torch.dtype, case: Case) -> Decoder:
    """Return a decoder of this shape on the meta device: adapted, or with all of it trained."""
    model = build_empty(shape).to(dtype)
    if case.is_full:
        return model.requires_grad_(True)
    use_quantised_linears(model, case.base)
    apply_lora(model, lora_config())
    return model


def random_rows(shapes: Mapping[str, torch.Size], device: torch.device) -> Rows:
    """Return what stands for the files: random rows of matrices, and norms of 1."""

    def read(name: str, rows: slice) -> Tensor:
        sizes = (len(range(*rows.indices(shapes[name][0]))), *shapes[name][1:])
        if len(sizes) == 1:
            return torch.ones(sizes, device=device)
        return _drawn(sizes, torch.bfloat16, device).mul_(SPREAD)

    return read


def _drawn(sizes: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(sizes, dtype=dtype, device=device)
