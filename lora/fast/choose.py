"""Chooses the step that trains a model on a device, and says why not a faster one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import nn

from lora.config import TrainConfig
from lora.decoder.decoder import Decoder
from lora.decoder.language_model import LanguageModel
from lora.device import DeviceChoice
from lora.distributed.shards import Rows
from lora.distributed.world import ALONE, World
from lora.fast.llama.checkpointing import ActivationCheckpointing
from lora.fast.runner import CapturedStepRunner, FastStepRunner
from lora.fast.sharded.base import ShardedBase
from lora.fast.sharded.machines import machine_world
from lora.fast.step import trains_all_weights
from lora.fast.why_not import why_not_captured, why_not_fast, why_not_sharded
from lora.kernels.step.jit import HAS_TRITON
from lora.training.losses import loss_for
from lora.training.plain_step import PlainStepRunner
from lora.training.sharded_step import ShardedStepRunner
from lora.training.step_runner import LossFn, StepRunner

MIN_COMPILED_STEPS = 300
"""Shorter runs are not compiled: torch.compile takes 14 s and saves 7 to 70 ms per step."""


@dataclass(frozen=True)
class Recompute:
    """How many blocks recompute their activations in the backward pass of FSDP2's step."""

    n_blocks: int | None = None
    """As planned; None: no plan was made."""
    may_be_more: bool = True
    """Whether those that do not fit then may join them: no user named the number."""


@dataclass(frozen=True)
class PlannedStep:
    """What a memory plan decides of a step; each kind of step reads what is for it."""

    checkpointing: ActivationCheckpointing | None = None
    """Which activations the fast step recomputes; None: hardly any."""
    leaner: Callable[[], ActivationCheckpointing | None] = lambda: None
    """Called if the fast step's first one runs out of memory; returns what to try next."""
    by_machine: bool = False
    """The fast step's weights are sharded over each machine's processes alone."""
    recompute: Recompute = Recompute()
    """Which blocks of a model that FSDP2 shards recompute, on a GPU."""


def choose_steps(
    model: nn.Module,
    choice: DeviceChoice,
    config: TrainConfig,
    *,
    fast: bool = True,
    planned: PlannedStep = PlannedStep(),
    on_message: Callable[[str], None] = lambda text: None,
    loss_fn: LossFn | None = None,
    world: World = ALONE,
    rows: Rows | None = None,
) -> StepRunner:
    """Return the runner of the fastest step that can train `model`; report on a GPU which, and why.

    The plain step is taken on a CPU, where `fast` is false, and where no other can. What trains in
    `model` may become views of the step's own tensors.

    Args:
        model: on the device; what trains has `requires_grad`.
        choice: where it runs, and the compute dtype.
        config: of the run; short runs are not compiled.
        fast: False takes the plain step.
        planned: how it fits into memory.
        on_message: gets one line.
        loss_fn: the plain step's; None: what fits `model`.
        world: the processes that train together.
        rows: the values of what `model`, a Decoder, has on the meta device: it is sharded over
            the processes.
    """
    if rows is not None:
        return _choose_sharded(
            cast(Decoder, model), rows, choice, config, fast, planned, on_message, world
        )

    def plain() -> StepRunner:
        return PlainStepRunner(model, loss_fn or loss_for(model), choice, config, world)

    # Triton kernels and CUDA graphs are what makes the other steps fast.
    if choice.device.type != "cuda":
        return plain()
    if not fast:
        on_message("plain step: as asked")
        return plain()
    why_not = why_not_fast(model, choice)
    if why_not is None:
        return _fast_steps(cast(Decoder, model), choice, config, planned, on_message, world)
    # Slower than the fast step, but any model's own forward can be captured.
    why_not_either = why_not_captured(model)
    if why_not_either is not None:
        on_message(f"plain step: {why_not}; {why_not_either}")
        return plain()
    # torch.compile needs Triton for its kernels.
    compiles = HAS_TRITON and (config.steps or 0) >= MIN_COMPILED_STEPS
    language_model = cast(LanguageModel, model)
    steps = CapturedStepRunner(language_model, choice, config, compiles=compiles, world=world)
    on_message(f"{steps.describe()} (the fast step cannot: {why_not})")
    return steps


def _fast_steps(
    model: Decoder,
    choice: DeviceChoice,
    config: TrainConfig,
    planned: PlannedStep,
    on_message: Callable[[str], None],
    world: World,
    base: ShardedBase | None = None,
) -> FastStepRunner:
    steps = FastStepRunner(
        model,
        choice,
        config,
        checkpointing=planned.checkpointing,
        leaner=planned.leaner,
        world=world,
        base=base,
    )
    on_message(steps.describe())
    return steps


def _choose_sharded(
    model: Decoder,
    rows: Rows,
    choice: DeviceChoice,
    config: TrainConfig,
    fast: bool,
    planned: PlannedStep,
    on_message: Callable[[str], None],
    world: World,
) -> StepRunner:
    """Changes `model` in place: its weights are sharded; return the runner for it."""
    why_not = why_not_fast(model, choice) if fast else "as asked"
    why_not = why_not or why_not_sharded(model)
    if trains_all_weights(model):
        why_not = "all weights train"
    if why_not is not None:
        recompute = planned.recompute
        return _shard_with_fsdp2(model, rows, choice, config, on_message, why_not, world, recompute)
    among = machine_world(world) if planned.by_machine else world
    base = ShardedBase(rows, choice.device, among)
    return _fast_steps(model, choice, config, planned, on_message, world, base)


def _shard_with_fsdp2(
    model: Decoder,
    rows: Rows,
    choice: DeviceChoice,
    config: TrainConfig,
    on_message: Callable[[str], None],
    why: str,
    world: World,
    recompute: Recompute,
) -> StepRunner:
    """Changes `model` in place: its weights are sharded and loaded; return the runner for it.

    `why` says why not the hand-written step.
    """
    from lora.distributed.fsdp import (  # its import takes longer than a second
        blocks_to_recompute,
        set_recompute,
        shard_decoder,
    )

    device, is_gpu = choice.device, choice.device.type == "cuda"
    shard_decoder(model, rows, world, choice, recompute=is_gpu)
    n_blocks = len(model.trunk.blocks())

    def take(n: int) -> None:
        set_recompute(model, n)
        words = f"{n} of {n_blocks} recomputed in the backward pass"
        on_message(f"plain step with FSDP2, {words}: {why}")

    if not trains_all_weights(model):
        if is_gpu:
            take(n_blocks if recompute.n_blocks is None else recompute.n_blocks)
        return PlainStepRunner(model, loss_for(model), choice, config, world)

    def fit(n_tokens: int) -> None:
        planned = recompute.n_blocks or 0
        if recompute.may_be_more:
            planned = max(planned, blocks_to_recompute(model, n_tokens, world, device))
        take(planned)

    on_first = fit if is_gpu else None
    return ShardedStepRunner(model, loss_for(model), choice, config, world, on_first)
