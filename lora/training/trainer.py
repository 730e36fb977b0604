"""The one loop: takes steps, evaluates, saves, and stops when asked to.

The step itself is in `plain_step`, what a job is and how it is saved in `training_job`; both are
also found here, where the rest of lora looks for them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time

import torch

from lora.device import peak_memory_bytes
from lora.errors import Interrupted, TrainingError
from lora.runs.interrupts import StopRequests
from lora.training.heap import retain_freed_memory
from lora.training.job import (
    LoopState,
    Stream,
    TrainingJob,
    TrainResult,
    resume_loop_state,
    save_loop_state,
)
from lora.training.optim import build_optimizer, rate_factor
from lora.training.out_of_memory import advise, count_parts, describe_parts, explained
from lora.training.plain_step import LossFn, PlainStepRunner, StepResult, evaluate, train_step
from lora.training.spikes import WINDOW_STEPS, is_spike
from lora.training.step_runner import StepOutcome, StepRunner

__all__ = [
    "LossFn",
    "PlainStepRunner",
    "StepResult",
    "Stream",
    "TrainResult",
    "TrainingJob",
    "evaluate",
    "train",
    "train_step",
]


def train(job: TrainingJob) -> TrainResult:
    """Changes `job.model` in place: run the job to its end, or from its newest checkpoint on."""
    config = job.train_config
    job.model.train()
    optimizer = build_optimizer(
        job.model, job.learning_rate, config.weight_decay, config.whole_rate_fraction
    )
    job.run.on_trouble = job.progress.message
    at = resume_loop_state(job, optimizer) if job.resume else LoopState()
    steps = job.steps or PlainStepRunner(job.model, job.loss_fn, job.choice, config.max_grad_norm)
    steps.adopt(optimizer)
    job.progress.start(config.steps, at.step)
    try:
        with (
            StopRequests(job.progress.message) as stop,
            explained(lambda: _say_memory(job, at)),
            retain_freed_memory(),
        ):
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
    steps: StepRunner,
    optimizer: torch.optim.Optimizer,
    at: LoopState,
    stop: StopRequests,
) -> None:
    """Take steps, evaluate and save until the run is over or a signal asks to stop."""
    if at.step == 0:
        _evaluate_and_note(job, at)
    n_steps = job.train_config.steps
    eval_every = job.run_config.eval_interval(n_steps)
    save_every = job.run_config.save_interval(n_steps)
    at.marked_s, tried_step = time.perf_counter(), None
    while not _is_over(job, at) and stop.received is None:
        number = at.step + 1
        evaluates = number % eval_every == 0 or number == n_steps
        saves = number % save_every == 0 or number == n_steps
        _one_step(job, steps, at, wait=evaluates or saves)
        is_best = evaluates and _evaluate_and_note(job, at)
        # The best is saved when it is found: the next regular save would be of other weights.
        if saves or is_best or at.stopped_early:
            save_loop_state(job, optimizer, at, is_best=is_best)
            tried_step = at.step
        if evaluates or saves:
            at.marked_s = time.perf_counter()
    for done in steps.finished(wait=True):  # of an interrupted run
        _note(job, at, done)
    if at.step not in (at.saved_step, tried_step):
        save_loop_state(job, optimizer, at)


def _is_over(job: TrainingJob, at: LoopState) -> bool:
    return at.step >= job.train_config.steps or at.stopped_early


def _say_memory(job: TrainingJob, at: LoopState) -> str:
    config, peak_bytes = job.train_config, peak_memory_bytes(job.choice.device)
    parts = job.memory_plan or count_parts(job.model, peak_bytes)
    kind = "counted" if job.memory_plan is None else "planned"
    has_lora = not all(p.requires_grad for p in job.model.parameters())
    saved = "No checkpoint was written yet."
    if at.saved_step is not None:
        saved = f"The checkpoint of step {at.saved_step} is whole: --resume goes on from there."
    return (
        f"at step {at.step} of {config.steps} on {job.choice.device}, after a peak of "
        f"{peak_bytes / 1e9:.2f} GB. It was {kind} to take {describe_parts(parts)}. "
        f"{advise(parts, config, has_lora=has_lora)} {saved}"
    )


def _say_interrupted(job: TrainingJob, at: LoopState, stop: StopRequests) -> str:
    name = stop.received.name if stop.received else ""
    saved = "nothing could be saved" if at.saved_step is None else f"step {at.saved_step} is saved"
    total = job.train_config.steps
    return (
        f"{name} stopped {job.run.folder} after step {at.step} of {total}; {saved}. Give --resume "
        "to go on."
    )


def _one_step(job: TrainingJob, steps: StepRunner, at: LoopState, *, wait: bool) -> None:
    """Launch the next step and note those that are done: all of them if `wait`."""
    rate = job.learning_rate * rate_factor(at.step, job.train_config)
    at.step += 1
    batches = [next(job.stream) for _ in range(job.train_config.micro_batches)]
    steps.launch(at.step, batches, rate)
    for done in steps.finished(wait=wait):
        _note(job, at, done)


def _note(job: TrainingJob, at: LoopState, done: StepOutcome) -> None:
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
        job.progress.message(
            f"step {done.number}: the loss {done.losses[0]:.4g} leaps from {usual:.4g}"
        )
    at.recent_losses = [*at.recent_losses, done.losses[0]][-WINDOW_STEPS:]
    job.run.append_metrics(row)
    memory = peak_memory_bytes(job.choice.device)
    job.run.append_timing({"step": done.number, "step_s": step_s, "peak_memory_bytes": memory})
    job.progress.step(done.number, done.losses[0], at.n_tokens / at.train_s, memory)


def _skip(job: TrainingJob, at: LoopState, done: StepOutcome) -> None:
    """Count a step that was not taken. Raises TrainingError if that is one too many."""
    at.skipped_steps += 1
    most, total = job.run_config.skip_nonfinite, job.train_config.steps
    message = f"Step {done.number} of {total}: {done.not_finite}"
    if done.places is not None and (named := job.name_examples(done.number, done.places)):
        message += f" {named}"
    if at.skipped_steps > most:
        raise TrainingError(message)
    job.run.append_metrics({"step": done.number, "skipped": at.skipped_steps})
    job.progress.message(f"{message} Left out: {at.skipped_steps} of at most {most}.")


def _evaluate_and_note(job: TrainingJob, at: LoopState) -> bool:
    """Return whether this evaluation is the best of the run so far."""
    batches = iter(job.eval_batches())
    first = next(batches, None)
    if first is None:  # nothing is held out
        return False
    every = itertools.chain((first,), batches)
    at.eval_loss = evaluate(job.model, every, job.loss_fn, job.choice.autocast)
    if not math.isfinite(at.eval_loss):
        job.run.append_metrics({"step": at.step, "eval_not_finite": str(at.eval_loss)})
        job.progress.message(
            f"step {at.step}: the held-out loss is {at.eval_loss}, not finite: look for damaged "
            "held-out examples, or lower the learning rate"
        )
        at.eval_loss = math.nan
        job.on_eval(at.step)
        return False
    job.run.append_metrics({"step": at.step, "eval_loss": at.eval_loss})
    job.progress.message(f"step {at.step}: held-out loss {at.eval_loss:.4f}")
    better = at.eval_loss < at.best_eval_loss
    at.best_eval_loss = min(at.best_eval_loss, at.eval_loss)
    at.evals_since_best = 0 if better else at.evals_since_best + 1
    patience = job.run_config.patience
    if patience and at.evals_since_best >= patience:
        at.stopped_early = True
        job.progress.message(
            f"no better loss in {patience} evaluations: stopping at step {at.step}"
        )
    job.on_eval(at.step)
    return better
