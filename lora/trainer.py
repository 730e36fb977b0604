"""The training step, and the one loop around it.

Models meet the trainer through `loss_fn(model, batch) -> (loss sum, target tokens)`, both (K,),
with K = 1 unless several adapters train together. Nothing here knows what a batch is.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora.checkpoint import (
    list_checkpoints,
    load_newest,
    restore_training_tensors,
    save_checkpoint,
    training_tensors,
)
from lora.config import LEAST_EVAL_STEPS, MOST_EVALUATIONS, RunConfig, TrainConfig
from lora.device import DeviceChoice, peak_memory_bytes, synchronize
from lora.diagnosis import find_nonfinite
from lora.errors import CheckpointError, Interrupted, TrainingError
from lora.interrupts import StopRequests
from lora.optim import build_optimizer, rate_factor, scale_and_clip, set_rate
from lora.progress import NoProgress, Progress
from lora.runs import Run
from lora.spikes import WINDOW_STEPS, is_spike
from lora.steps import StepDone, Steps

LossFn = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


class Stream(Protocol):
    """Endless batches whose position can be saved."""

    def __next__(self) -> Any:
        """Return the next batch, one micro-batch of a step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as values that JSON holds."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position that `state_dict` returned."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports; tensors stay on the device until they are read."""

    loss: Tensor
    """Mean over the step's target tokens, in nats, (K,)."""
    n_tokens: Tensor
    """Target tokens, (K,)."""
    gradient_norm: Tensor
    """Of the mean gradient, before clipping, ()."""


def train_step(
    model: nn.Module,
    micro_batches: Sequence[Any],
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> StepResult:
    """Changes `model` and `optimizer` in place: one step on the mean loss of all micro-batches.

    The loss is the mean over the target tokens of the whole step, however it is split. Raises
    TrainingError before anything is changed if the loss or the gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    losses, counts = [], []
    for batch in micro_batches:
        with autocast():
            loss_sum, n_tokens = loss_fn(model, batch)  # (K,), (K,)
        loss_sum.sum().backward()
        losses.append(loss_sum.detach())
        counts.append(n_tokens)
    n_tokens = torch.stack(counts).sum(0)  # (K,)
    loss = torch.stack(losses).sum(0) / n_tokens.clamp(min=1)  # (K,)
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = scale_and_clip(gradients, n_tokens, max_grad_norm)
    # The host waits for the device here: nothing may move before the check.
    if not torch.isfinite(norm + loss.sum()):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"The loss is {loss.tolist()} and the gradient's norm {norm.item()}: not finite, so "
            "the step was not taken. Lower the learning rate, or look for damaged examples."
        )
    optimizer.step()
    return StepResult(loss=loss, n_tokens=n_tokens, gradient_norm=norm)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """Return the mean loss in nats over all target tokens of `batches`, dropout off."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        with autocast():
            loss_sum, n_tokens = loss_fn(model, batch)
        total += loss_sum.double().sum().item()
        count += int(n_tokens.sum().item())
    model.train(was_training)
    return total / count if count else math.nan


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
    steps: Steps | None = None
    """What takes the steps; None: `train_step`, one after the other."""


class PlainSteps:
    """`lora.steps.Steps` through `train_step`: a step is done when it is launched."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._done: list[StepDone] = []

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Step with `optimizer`."""
        self._optimizer = optimizer

    def launch(self, number: int, batches: Sequence[Any], rate: float) -> None:
        """Take step `number`."""
        job = self._job
        set_rate(self._optimizer, rate)
        try:
            result = train_step(
                job.model,
                batches,
                job.loss_fn,
                self._optimizer,
                max_grad_norm=job.train_config.max_grad_norm,
                autocast=job.choice.autocast,
            )
        except TrainingError as error:
            where = find_nonfinite(job.model, batches, job.loss_fn, job.choice.autocast)
            why = f"{error} {where}"
            self._done.append(StepDone(number, [math.nan], 0, math.nan, rate, why))
            return
        synchronize(job.choice.device)
        losses, tokens = result.loss.tolist(), int(result.n_tokens.sum())
        norm = result.gradient_norm.item()
        self._done.append(StepDone(number, losses, tokens, norm, rate))

    def finished(self, *, wait: bool) -> list[StepDone]:
        """Return the steps taken since the last call."""
        done, self._done = self._done, []
        return done


@dataclass
class _Position:
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
    """The step of the best evaluation, if it was saved."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps, for spikes."""
    saved_step: int | None = None
    """The newest that is on the disk."""
    marked_s: float = 0.0
    """Clock when the last step was noted, or steps began again."""


def train(job: TrainingJob) -> TrainResult:
    """Changes `job.model` in place: run the job to its end, or from its newest checkpoint on."""
    config = job.train_config
    job.model.train()
    optimizer = build_optimizer(
        job.model, job.learning_rate, config.weight_decay, config.whole_rate_fraction
    )
    job.run.on_trouble = job.progress.say
    at = _resume(job, optimizer) if job.resume else _Position()
    steps = job.steps or PlainSteps(job)
    steps.adopt(optimizer)
    job.progress.start(config.steps, at.step)
    try:
        with StopRequests(job.progress.say) as stop:
            _loop(job, steps, optimizer, at, stop)
    finally:
        job.progress.stop()
    if stop.received is not None and not _is_over(job, at):
        raise Interrupted(_say_interrupted(job, at, stop), stop.exit_code)
    return TrainResult(
        steps=at.step,
        eval_loss=at.eval_loss,
        best_eval_loss=at.best_eval_loss,
        train_s=at.train_s,
        n_tokens=at.n_tokens,
        peak_memory_bytes=peak_memory_bytes(job.choice.device),
        stopped_early=at.stopped_early,
    )


def _loop(
    job: TrainingJob,
    steps: Steps,
    optimizer: torch.optim.Optimizer,
    at: _Position,
    stop: StopRequests,
) -> None:
    """Take steps, evaluate and save until the run is over or a signal asks to stop."""
    if at.step == 0:
        _evaluate_and_note(job, at)
    eval_every, save_every = _intervals(job)
    at.marked_s = time.perf_counter()
    while not _is_over(job, at) and stop.received is None:
        number = at.step + 1
        evaluates = number % eval_every == 0 or number == job.train_config.steps
        saves = number % save_every == 0 or number == job.train_config.steps
        _one_step(job, steps, at, wait=evaluates or saves)
        if evaluates:
            _evaluate_and_note(job, at)
        if saves or at.stopped_early:
            _save(job, optimizer, at)
        if evaluates or saves:
            at.marked_s = time.perf_counter()
    for done in steps.finished(wait=True):  # of an interrupted run
        _note(job, at, done)
    if at.saved_step != at.step:
        _save(job, optimizer, at)


def _is_over(job: TrainingJob, at: _Position) -> bool:
    return at.step >= job.train_config.steps or at.stopped_early


def _say_interrupted(job: TrainingJob, at: _Position, stop: StopRequests) -> str:
    name = stop.received.name if stop.received else ""
    saved = "nothing could be saved" if at.saved_step is None else f"step {at.saved_step} is saved"
    total = job.train_config.steps
    return (
        f"{name} stopped {job.run.folder} after step {at.step} of {total}; {saved}. Give --resume "
        "to go on."
    )


def _one_step(job: TrainingJob, steps: Steps, at: _Position, *, wait: bool) -> None:
    """Launch the next step and note those that are done: all of them if `wait`."""
    rate = job.learning_rate * rate_factor(at.step, job.train_config)
    at.step += 1
    batches = [next(job.stream) for _ in range(job.train_config.micro_batches)]
    steps.launch(at.step, batches, rate)
    for done in steps.finished(wait=wait):
        _note(job, at, done)


def _note(job: TrainingJob, at: _Position, done: StepDone) -> None:
    now_s = time.perf_counter()
    step_s, at.marked_s = now_s - at.marked_s, now_s
    if done.not_finite:
        _skip(job, at, done)
        return
    at.n_tokens += done.n_tokens
    at.train_s += step_s
    loss = done.losses[0] if len(done.losses) == 1 else done.losses
    row = {"step": done.number, "loss": loss, "learning_rate": done.rate}
    row |= {"gradient_norm": done.gradient_norm, "tokens": at.n_tokens}
    if is_spike(done.losses[0], at.recent_losses):
        row["spike"] = True
        usual = statistics.median(at.recent_losses)
        job.progress.say(
            f"step {done.number}: the loss {done.losses[0]:.4g} leaps from {usual:.4g}"
        )
    at.recent_losses = [*at.recent_losses, done.losses[0]][-WINDOW_STEPS:]
    job.run.append_metrics(row)
    memory = peak_memory_bytes(job.choice.device)
    job.run.append_timing({"step": done.number, "step_s": step_s, "peak_memory_bytes": memory})
    job.progress.step(done.number, done.losses[0], at.n_tokens / at.train_s, memory)


def _skip(job: TrainingJob, at: _Position, done: StepDone) -> None:
    """Count a step that was not taken. Raises TrainingError if that is one too many."""
    at.skipped_steps += 1
    most, total = job.run_config.skip_nonfinite, job.train_config.steps
    message = f"Step {done.number} of {total}: {done.not_finite}"
    if at.skipped_steps > most:
        raise TrainingError(message)
    job.run.append_metrics({"step": done.number, "skipped": at.skipped_steps})
    job.progress.say(f"{message} Left out: {at.skipped_steps} of at most {most}.")


def _evaluate_and_note(job: TrainingJob, at: _Position) -> None:
    at.eval_loss = evaluate(job.model, job.eval_batches(), job.loss_fn, job.choice.autocast)
    if math.isnan(at.eval_loss):
        return
    job.run.append_metrics({"step": at.step, "eval_loss": at.eval_loss})
    job.progress.say(f"step {at.step}: held-out loss {at.eval_loss:.4f}")
    better = at.eval_loss < at.best_eval_loss
    at.best_eval_loss = min(at.best_eval_loss, at.eval_loss)
    at.evals_since_best = 0 if better else at.evals_since_best + 1
    patience = job.run_config.patience
    if patience and at.evals_since_best >= patience:
        at.stopped_early = True
        job.progress.say(f"no better loss in {patience} evaluations: stopping at step {at.step}")
    job.on_eval(at.step)


def _intervals(job: TrainingJob) -> tuple[int, int]:
    spread = math.ceil(job.train_config.steps / MOST_EVALUATIONS)
    eval_every = job.run_config.eval_every_steps or max(LEAST_EVAL_STEPS, spread)
    return eval_every, job.run_config.save_every_steps or eval_every


def _save(job: TrainingJob, optimizer: torch.optim.Optimizer, at: _Position) -> None:
    """Save the run's state; if the disk refuses, say so: the next save is another try."""
    if at.eval_loss == at.best_eval_loss and at.evals_since_best == 0:
        at.best_step = at.step
    position = {k: v for k, v in vars(at).items() if k not in ("marked_s", "saved_step")}
    state = {"position": position, "stream": job.stream.state_dict()}
    try:
        job.run.sync()
        save_checkpoint(
            job.run.folder / "checkpoints",
            at.step,
            training_tensors(job.model, optimizer),
            state,
            keep=job.run_config.keep_checkpoints,
            best_step=at.best_step,
        )
    except CheckpointError as error:
        newest = "none" if at.saved_step is None else f"step {at.saved_step}"
        job.progress.say(f"{error} The newest checkpoint is {newest}; the next save tries again.")
        return
    at.saved_step = at.step


def _resume(job: TrainingJob, optimizer: torch.optim.Optimizer) -> _Position:
    folder = job.run.folder / "checkpoints"
    if not list_checkpoints(folder):  # stopped before the first was whole
        job.run.cut_metrics_after(-1)
        job.progress.say("no checkpoint yet: beginning at step 0")
        return _Position()
    tensors, state = load_newest(folder, job.progress.say)
    restore_training_tensors(job.model, optimizer, tensors)
    job.stream.load_state_dict(state["stream"])
    at = _Position(**state["position"])
    at.saved_step = at.step
    job.run.cut_metrics_after(at.step)
    job.progress.say(f"going on from step {at.step} of {job.train_config.steps}")
    return at
