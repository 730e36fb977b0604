"""What a training run needs, the state of its loop, and how that is saved and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from lora.config import RunConfig, TrainConfig
from lora.device import DeviceChoice
from lora.distributed.shards import on_main_with
from lora.distributed.tensors import broadcast_tensors, ranks_that_differ
from lora.distributed.world import ALONE, World
from lora.errors import CheckpointError
from lora.runs.directory import Run
from lora.runs.disk import reading
from lora.runs.progress import NoProgress, Progress
from lora.runs.record import MetricsRow
from lora.training.callbacks import Callback
from lora.training.checkpoint import (
    has_checkpoint,
    list_checkpoints,
    load_newest,
    save_checkpoint,
)
from lora.training.out_of_memory import MemoryParts
from lora.training.sharded_step import ShardedStepRunner
from lora.training.step_runner import StepRunner


class Stream(Protocol):
    """Endless batches whose position can be saved."""

    def __next__(self) -> Any:
        """Return the next batch, one micro-batch of a step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as values that JSON holds."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that `state_dict` returned."""


@dataclass
class TrainResult:
    """How a run ended."""

    steps: int
    eval_loss: float
    """Validation loss at the end, nats; NaN without validation data."""
    best_eval_loss: float
    train_s: float
    """Seconds spent in steps; evaluations and saves are not in it."""
    n_tokens: int
    peak_memory_bytes: int
    stopped_early: bool
    start_eval_loss: float
    """Validation loss before the first step, nats; NaN without validation data."""
    best_step: int | None
    """The step of `best_eval_loss`; 0 if no step improved on the start, None without validation."""
    saved_step: int
    """The step whose weights the model has now, which are those to save."""
    saved_eval_loss: float
    """Validation loss of these weights."""
    diverged: bool
    """Whether the loss of these weights is far above that of the start, or not finite."""
    warnings: tuple[str, ...]
    """What makes the result doubtful, in words."""
    n_processed_tokens: int | None = None
    """Of all steps, learned or not, padding left out; None: not known."""


@dataclass
class TrainingJob:
    """Everything the loop needs; `lora.training.trainer.train` runs it."""

    model: nn.Module
    steps: StepRunner
    """What takes the optimizer steps of `model`, evaluates it, and owns the optimizer."""
    stream: Stream
    """Micro-batches on `steps.batch_device`."""
    eval_batches: Callable[[], Iterable[Any]]
    """Return the validation batches, on the model's device; none: nothing is evaluated."""
    train_config: TrainConfig
    """Its `learning_rate` is given."""
    run_config: RunConfig
    run: Run
    choice: DeviceChoice
    progress: Progress = field(default_factory=NoProgress)
    on_eval: Callable[[int], None] = lambda step: None
    """Called after each evaluation with the step's number: for samples, for example."""
    resume: bool = False
    """Continue from the run's newest checkpoint."""
    name_examples: Callable[[int, Sequence[tuple[int, int]]], str] = lambda step, sequences: ""
    """(step, (micro-batch, index of a sequence in it) …; () for all) -> the examples' names."""
    memory_plan: MemoryParts | None = None
    """What a step was planned to hold, quoted if memory runs out."""
    callbacks: Sequence[Callback] = ()
    """Called after steps, evaluations and saves."""
    tokens_per_step: float | None = None
    """Tokens of a step, learned or not, padding left out: the mean. None: not known."""
    start_name: str = "the model before training"
    """What is evaluated before the first step, in words."""
    shown_model: nn.Module | None = None
    """What callbacks get as the model; None: `model`."""
    world: World = ALONE
    """The processes that train together, each with its own job: `stream`, `eval_batches` and
    `steps` are of this one's share, and only rank 0's `run` writes."""


@dataclass
class LoopState:
    """What changes from step to step, beside the tensors; a checkpoint's `position` has it."""

    step: int = 0
    n_tokens: int = 0
    train_s: float = 0.0
    best_eval_loss: float = math.inf
    evals_since_best: int = 0
    eval_loss: float = math.nan
    stopped_early: bool = False
    skipped_steps: int = 0
    start_eval_loss: float = math.nan
    """Validation loss before the first step."""
    best_eval_step: int | None = None
    """The step of `best_eval_loss`, 0 for the start."""
    best_step: int | None = None
    """The step of the best evaluation after the start whose checkpoint is on the disk."""
    best_saved_loss: float = math.inf
    """The validation loss of `best_step`: above `best_eval_loss` if the start is better, or if the
    disk refused the checkpoint of the best."""
    first_loss: float | None = None
    """Training loss of the first step."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps, for spikes."""
    saved_step: int | None = None
    """The newest that is on the disk."""
    evaluated_step: int | None = None
    """The newest that this process evaluated."""
    stop_asked: bool = False
    """Whether a callback has asked to end the run."""
    agreed_signal: int = 0
    """The number of the signal at which several processes have agreed to stop; 0: none."""
    marked_s: float = 0.0
    """Clock when the last step was recorded, or when steps began again after an evaluation."""


_UNSAVED = ("marked_s", "saved_step", "evaluated_step", "stop_asked", "agreed_signal")
"""Fields of `LoopState` that mean nothing to another process."""


def save_loop_state(job: TrainingJob, state: LoopState, *, is_best: bool = False) -> None:
    """Write a checkpoint; if the disk refuses, report it: the next save is another try.

    `is_best`: the evaluation of this very step is the best so far, so its checkpoint is kept.
    """
    best_step = state.step if is_best else state.best_step
    best_saved_loss = state.eval_loss if is_best else state.best_saved_loss
    position = {key: value for key, value in vars(state).items() if key not in _UNSAVED}
    position |= {"best_step": best_step, "best_saved_loss": best_saved_loss}
    tensors = job.steps.state()  # by every process: a part of them may be elsewhere
    _tell_of_differences(job, state.step)

    def save() -> None:
        job.run.sync()
        save_checkpoint(
            job.run.folder / "checkpoints",
            state.step,
            tensors,
            {"position": position, "stream": job.stream.state_dict()},
            keep=job.run_config.keep_checkpoints,
            best_step=best_step,
        )

    try:
        on_main_with(tensors.values(), job.world, save, f"the checkpoint of step {state.step}")
    except CheckpointError as error:
        newest = "none" if state.saved_step is None else f"step {state.saved_step}"
        job.progress.message(
            f"{error} The newest checkpoint is {newest}; the next save tries again."
        )
        return  # and the best checkpoint that is on the disk stays the best one
    state.saved_step, state.best_step = state.step, best_step
    state.best_saved_loss = best_saved_loss


def _tell_of_differences(job: TrainingJob, step: int) -> None:
    """Report processes whose weights are not rank 0's: all have made the same updates."""
    if job.world.is_alone or isinstance(job.steps, ShardedStepRunner):
        return
    trained = (p for p in job.model.parameters() if p.requires_grad)
    ranks = ranks_that_differ(trained, job.world, f"the checkpoint of step {step}")
    if ranks:
        job.progress.message(
            f"warning: after step {step} the weights that train differ from rank 0's on rank "
            f"{', '.join(map(str, ranks))}: look for GPUs of another kind, or damaged ones. Rank "
            "0's are saved"
        )


def resume_loop_state(job: TrainingJob) -> LoopState:
    """Changes model, optimizer, stream and generators in place: restore the newest checkpoint.

    Raises CheckpointError if there are checkpoints and none of them can be used.
    """
    folder = job.run.folder / "checkpoints"
    tensors: dict[str, Tensor] = {}

    def read() -> tuple[LoopState, dict[str, Any]] | None:
        if not list_checkpoints(folder):  # stopped before the first was whole
            return None
        read_tensors, saved = load_newest(folder, job.progress.message)
        tensors.update(read_tensors)
        with reading(folder):
            return _read_position(saved["position"], job.run.read_metrics, folder), saved["stream"]

    found = job.world.on_main(read, "the newest checkpoint")  # the others may have another disk
    if found is None:
        job.run.cut_metrics_after(-1)
        job.progress.message("no checkpoint yet: beginning at step 0")
        return LoopState()
    state, stream = found
    with reading(folder):
        if not isinstance(job.steps, ShardedStepRunner):  # which sends each process its rows
            tensors = broadcast_tensors(tensors, job.world, "the newest checkpoint")
        job.steps.restore(tensors, step=state.step)
        job.stream.load_state_dict(stream)
        if state.step == 0:  # nothing was trained: its evaluation and its samples come again
            job.run.cut_metrics_after(-1)
            return LoopState()
        state.saved_step = state.step
        # The patience of this process decides, not that of the one that stopped early.
        patience = job.run_config.patience
        state.stopped_early = bool(patience and state.evals_since_best >= patience)
        job.run.cut_metrics_after(state.step)
        job.progress.message(_describe_resume(job, state))
    return state


def _read_position(
    position: dict[str, Any], read_metrics: Callable[[], list[MetricsRow]], folder: Path
) -> LoopState:
    """Return the state that a checkpoint's `position` in `folder` holds; null is a default."""
    state = LoopState(**{key: value for key, value in position.items() if value is not None})
    if "start_eval_loss" not in position:  # of an older version: the metrics have it
        rows = [row for row in read_metrics() if row.step <= state.step]
        evaluated = {r.step: r.eval_loss for r in rows if r.eval_loss is not None}
        state.start_eval_loss = evaluated.get(0, math.nan)
        state.best_eval_step = min(evaluated, key=lambda step: evaluated[step], default=None)
        state.first_loss = next((row.loss for row in rows if row.loss is not None), None)
        state.best_saved_loss = math.inf
        if state.best_step is not None:
            state.best_saved_loss = evaluated.get(state.best_step, state.best_eval_loss)
    if state.best_step is not None and not has_checkpoint(folder, state.best_step):
        # Of a damaged newer one, which had pruned it: the next evaluation is the best on disk.
        state.best_step, state.best_saved_loss = None, math.inf
    return state


def _describe_resume(job: TrainingJob, state: LoopState) -> str:
    total = job.train_config.n_steps
    if state.step >= total:
        return f"nothing to train: all {total} steps are done. Give more --steps to continue"
    if state.stopped_early:
        return (
            f"nothing to train: no better loss in {state.evals_since_best} evaluations, stopped "
            f"early at step {state.step}. Give a larger --patience, or --patience 0, to continue"
        )
    return f"resuming after step {state.step} of {total}"
