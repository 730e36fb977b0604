"""What a training run needs, where it stands, how it is saved and how it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from lora.config import RunConfig, TrainConfig
from lora.device import DeviceChoice
from lora.errors import CheckpointError
from lora.runs.directory import Run
from lora.runs.disk import reading
from lora.runs.progress import NoProgress, Progress
from lora.training.checkpoint import (
    list_checkpoints,
    load_newest,
    restore_training_tensors,
    save_checkpoint,
    training_tensors,
)
from lora.training.plain_step import LossFn
from lora.training.step_runner import StepRunner

if TYPE_CHECKING:  # the plan knows LoRA, and plain training does without it
    from lora.fast.memory.plan import MemoryPlan


class Stream(Protocol):
    """Endless batches whose position can be saved."""

    def __next__(self) -> Any:
        """Return the next batch, one micro-batch of a step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as values that JSON holds."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position that `state_dict` returned."""


@dataclass
class TrainResult:
    """How a run ended."""

    steps: int
    eval_loss: float
    """Held-out loss at the end, nats; NaN where nothing was held out."""
    best_eval_loss: float
    train_s: float
    """Seconds spent in steps, evaluations and saves left out."""
    n_tokens: int
    peak_memory_bytes: int
    stopped_early: bool


@dataclass
class TrainingJob:
    """Everything the loop needs; `train` runs it."""

    model: nn.Module
    loss_fn: LossFn
    stream: Stream
    eval_batches: Callable[[], Iterable[Any]]
    train_config: TrainConfig
    learning_rate: float
    run_config: RunConfig
    run: Run
    choice: DeviceChoice
    progress: Progress = field(default_factory=NoProgress)
    on_eval: Callable[[int], None] = lambda step: None
    """Called after each evaluation with the step's number: for samples, for example."""
    resume: bool = False
    name_examples: Callable[[int, Sequence[tuple[int, int]]], str] = lambda step, places: ""
    """(step, (micro-batch, row) of it; () for all) -> which examples these are, in words."""
    memory_plan: MemoryPlan | None = None
    """What a step was planned to hold, quoted if memory runs out."""
    steps: StepRunner | None = None
    """What takes the steps; None: `train_step`, one after the other."""


@dataclass
class LoopState:
    """What changes from step to step, beside the tensors."""

    step: int = 0
    n_tokens: int = 0
    train_s: float = 0.0
    best_eval_loss: float = math.inf
    evals_since_best: int = 0
    eval_loss: float = math.nan
    stopped_early: bool = False
    skipped_steps: int = 0
    best_step: int | None = None
    """The step of the best evaluation whose checkpoint is on the disk; None: the start is best."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps, for spikes."""
    saved_step: int | None = None
    """The newest that is on the disk."""
    marked_s: float = 0.0
    """Clock when the last step was noted, or steps began again."""


def save_loop_state(
    job: TrainingJob, optimizer: torch.optim.Optimizer, at: LoopState, *, is_best: bool = False
) -> None:
    """Save the run's state; if the disk refuses, report it: the next save is another try.

    `is_best`: the evaluation of this very step is the best so far, so its checkpoint is kept.
    """
    best_step = at.step if is_best else at.best_step
    position = {k: v for k, v in vars(at).items() if k not in ("marked_s", "saved_step")}
    position["best_step"] = best_step
    state = {"position": position, "stream": job.stream.state_dict()}
    try:
        job.run.sync()
        save_checkpoint(
            job.run.folder / "checkpoints",
            at.step,
            training_tensors(job.model, optimizer),
            state,
            keep=job.run_config.keep_checkpoints,
            best_step=best_step,
        )
    except CheckpointError as error:
        newest = "none" if at.saved_step is None else f"step {at.saved_step}"
        job.progress.message(
            f"{error} The newest checkpoint is {newest}; the next save tries again."
        )
        return  # and the best checkpoint that is on the disk stays the best one
    at.saved_step, at.best_step = at.step, best_step


def resume_loop_state(job: TrainingJob, optimizer: torch.optim.Optimizer) -> LoopState:
    """Changes model, optimizer, stream and generators in place: go to the newest checkpoint.

    Raises CheckpointError if there are checkpoints and none of them can be used.
    """
    folder = job.run.folder / "checkpoints"
    if not list_checkpoints(folder):  # stopped before the first was whole
        job.run.cut_metrics_after(-1)
        job.progress.message("no checkpoint yet: beginning at step 0")
        return LoopState()
    tensors, state = load_newest(folder, job.progress.message)
    with reading(folder):
        restore_training_tensors(job.model, optimizer, tensors)
        job.stream.load_state_dict(state["stream"])
        at = LoopState(**state["position"])
    at.saved_step = at.step
    job.run.cut_metrics_after(at.step)
    job.progress.message(f"going on from step {at.step} of {job.train_config.steps}")
    return at
