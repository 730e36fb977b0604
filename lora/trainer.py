"""The training step, and the one loop around it.

Models meet the trainer through `loss_fn(model, batch) -> (loss sum, target tokens)`, both (K,),
with K = 1 unless several adapters train together. Nothing here knows what a batch is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora.checkpoint import (
    load_newest,
    restore_training_tensors,
    save_checkpoint,
    training_tensors,
)
from lora.config import LEAST_EVAL_STEPS, MOST_EVALUATIONS, RunConfig, TrainConfig
from lora.device import DeviceChoice, peak_memory_bytes, synchronize
from lora.diagnosis import find_nonfinite
from lora.errors import TrainingError
from lora.optim import build_optimizer, rate_factor, scale_and_clip, set_rate
from lora.progress import NoProgress, Progress
from lora.runs import Run
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
            total = job.train_config.steps
            raise TrainingError(f"Step {number} of {total}: {error} {where}") from None
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
    marked_s: float = 0.0
    """Clock when the last step was noted, or steps began again."""


def train(job: TrainingJob) -> TrainResult:
    """Changes `job.model` in place: run the job to its end, or from its newest checkpoint on."""
    config = job.train_config
    job.model.train()
    optimizer = build_optimizer(
        job.model, job.learning_rate, config.weight_decay, config.whole_rate_fraction
    )
    at = _resume(job, optimizer) if job.resume else _Position()
    steps = job.steps or PlainSteps(job)
    steps.adopt(optimizer)
    if at.step == 0:
        _evaluate_and_note(job, at)
    eval_every, save_every = _intervals(job)
    job.progress.start(config.steps, at.step)
    at.marked_s = time.perf_counter()
    try:
        while at.step < config.steps and not at.stopped_early:
            number = at.step + 1
            evaluates = number % eval_every == 0 or number == config.steps
            saves = number % save_every == 0 or number == config.steps
            _one_step(job, steps, at, wait=evaluates or saves)
            if evaluates:
                _evaluate_and_note(job, at)
            if saves or at.stopped_early:
                _save(job, optimizer, at)
            if evaluates or saves:
                at.marked_s = time.perf_counter()
    finally:
        job.progress.stop()
    return TrainResult(
        steps=at.step,
        eval_loss=at.eval_loss,
        best_eval_loss=at.best_eval_loss,
        train_s=at.train_s,
        n_tokens=at.n_tokens,
        peak_memory_bytes=peak_memory_bytes(job.choice.device),
        stopped_early=at.stopped_early,
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
    at.n_tokens += done.n_tokens
    at.train_s += step_s
    loss = done.losses[0] if len(done.losses) == 1 else done.losses
    row = {"step": done.number, "loss": loss, "learning_rate": done.rate}
    row |= {"gradient_norm": done.gradient_norm, "tokens": at.n_tokens}
    job.run.append_metrics(row)
    memory = peak_memory_bytes(job.choice.device)
    job.run.append_timing({"step": done.number, "step_s": step_s, "peak_memory_bytes": memory})
    job.progress.step(done.number, done.losses[0], at.n_tokens / at.train_s, memory)


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
    position = {key: value for key, value in vars(at).items() if key != "marked_s"}
    state = {"position": position, "stream": job.stream.state_dict()}
    tensors = training_tensors(job.model, optimizer)
    folder = job.run.folder / "checkpoints"
    save_checkpoint(folder, at.step, tensors, state, keep=job.run_config.keep_checkpoints)


def _resume(job: TrainingJob, optimizer: torch.optim.Optimizer) -> _Position:
    tensors, state = load_newest(job.run.folder / "checkpoints", job.progress.say)
    restore_training_tensors(job.model, optimizer, tensors)
    job.stream.load_state_dict(state["stream"])
    at = _Position(**state["position"])
    job.run.cut_metrics_after(at.step)
    job.progress.say(f"going on from step {at.step} of {job.train_config.steps}")
    return at
