"""How a run ended: which weights it leaves in the model, and what to tell of its losses."""

from __future__ import annotations

import math
import statistics

from lora.device import peak_memory_bytes
from lora.distributed.tensors import broadcast_trained
from lora.errors import CheckpointError
from lora.runs.progress import TokenRate, describe_rate
from lora.training.checkpoint import checkpoint_path, load_trained_tensors
from lora.training.job import LoopState, TrainingJob, TrainResult
from lora.training.sharded_step import ShardedStepRunner

DIVERGED_FACTOR, DIVERGED_NATS = 1.5, 0.5
"""A loss has diverged where it is above its start by this factor, and by this much."""


def finish_run(job: TrainingJob, state: LoopState) -> TrainResult:
    """Changes `job.model` in place: it gets the best weights, if these are to be saved.

    Returns the result, with what a user should know of the losses; `job.progress` gets that too.
    """
    saved_step, saved_loss = _leave_best(job, state)
    diverged = _has_diverged(state, saved_loss)
    warnings = tuple(_find_warnings(job, state, saved_step, saved_loss))
    for warning in warnings:
        job.progress.message(f"warning: {warning}")
    return TrainResult(
        steps=state.step,
        eval_loss=state.eval_loss,
        best_eval_loss=state.best_eval_loss,
        train_s=state.train_s,
        n_tokens=state.n_tokens,
        peak_memory_bytes=max(job.world.gather(peak_memory_bytes(job.choice.device), "the end")),
        stopped_early=state.stopped_early,
        start_eval_loss=state.start_eval_loss,
        best_step=state.best_eval_step,
        saved_step=saved_step,
        saved_eval_loss=saved_loss,
        diverged=diverged,
        warnings=warnings,
        n_processed_tokens=n_processed_tokens(job, state),
    )


def n_processed_tokens(job: TrainingJob, state: LoopState) -> int | None:
    """Return the tokens of the steps so far, learned or not; None where that is not known."""
    taken = state.step - state.skipped_steps
    return None if job.tokens_per_step is None else round(taken * job.tokens_per_step)


def token_rate(job: TrainingJob, state: LoopState) -> TokenRate:
    """Return the tokens per second of the steps so far: learned ones, and all of them."""
    n_tokens = n_processed_tokens(job, state)
    train_s = max(state.train_s, 1e-9)
    return TokenRate(state.n_tokens / train_s, None if n_tokens is None else n_tokens / train_s)


def _leave_best(job: TrainingJob, state: LoopState) -> tuple[int, float]:
    """Changes `job.model` in place; return the step and the validation loss of what it holds.

    The best is that of the evaluations after training began; the start itself is never saved.
    """
    last, best_step, best_loss = (
        (state.step, state.eval_loss),
        state.best_step,
        state.best_saved_loss,
    )
    is_last_worse = math.isnan(state.eval_loss) or best_loss < state.eval_loss
    if job.run_config.save == "last" or best_step in (None, state.step) or not is_last_worse:
        return last
    assert best_step is not None
    path = checkpoint_path(job.run.folder / "checkpoints", best_step)
    try:
        # From the disk: a copy in memory would cost as much again as the weights that train, and a
        # resumed run would not have it.
        if isinstance(job.steps, ShardedStepRunner):
            job.steps.load_trained(path)
        else:
            job.world.on_main(lambda: load_trained_tensors(job.model, path), "the best checkpoint")
            broadcast_trained(job.model, job.world, "the best checkpoint")
    except CheckpointError as error:
        job.progress.message(
            f"{error} So what is saved is the end of the run, step {state.step}, not its best, "
            f"step {best_step}."
        )
        return last
    return best_step, best_loss


def _has_diverged(state: LoopState, saved_loss: float) -> bool:
    """Return whether what is saved is far above the start: by validation loss, where there is."""
    if math.isfinite(state.start_eval_loss):
        return not math.isfinite(saved_loss) or _is_far_above(saved_loss, state.start_eval_loss)
    return _has_training_diverged(state)


def _has_training_diverged(state: LoopState) -> bool:
    first, recent = state.first_loss, state.recent_losses
    return first is not None and bool(recent) and _is_far_above(_end_of(recent), first)


def _is_far_above(loss: float, start: float) -> bool:
    return loss > max(DIVERGED_FACTOR * start, start + DIVERGED_NATS)


def _end_of(recent: list[float]) -> float:
    return statistics.median(recent[-8:])


def _find_warnings(
    job: TrainingJob, state: LoopState, saved_step: int, saved_loss: float
) -> list[str]:
    """Return in plain words what makes the result doubtful."""
    found, start, end = [], state.start_eval_loss, state.eval_loss
    rate = f"Lower the learning rate (it was {job.train_config.peak_learning_rate:g})"
    if _has_training_diverged(state):
        found.append(
            f"the training loss diverged, from {state.first_loss:.4g} in the first step to "
            f"{_end_of(state.recent_losses):.4g} in the last ones. {rate}."
        )
    if not math.isfinite(start):
        return found
    if not saved_loss <= start:
        found.append(
            f"what was saved is worse than {job.start_name}: the validation loss is "
            f"{saved_loss:.4f} after step {saved_step}, and {start:.4f} before training. {rate}, "
            "or give more data."
        )
    elif not end <= start:
        found.append(
            f"the end of the run is worse than {job.start_name}: the validation loss is {end:.4f} "
            f"after step {state.step}, and {start:.4f} before training. Saved is step "
            f"{saved_step}, with {saved_loss:.4f}. {rate}, or train for fewer steps."
        )
    return found


def describe_result(result: TrainResult) -> list[str]:
    """Return lines for the user: the losses with their steps, how the run ended, time, memory."""
    early = ", stopped early" if result.stopped_early else ""
    losses = f"no finite validation loss after {result.steps} steps{early}"
    if math.isfinite(result.eval_loss) or math.isfinite(result.start_eval_loss):
        best = "best is the start"
        if result.best_step:
            best = f"best {_loss_text(result.best_eval_loss)} at step {result.best_step}"
        losses = (
            f"validation loss: {_loss_text(result.start_eval_loss)} at the start, {best}, "
            f"{_loss_text(result.eval_loss)} at the end (step {result.steps}{early})"
        )
    train_s, n_tokens = max(result.train_s, 1e-9), result.n_processed_tokens
    rate = TokenRate(result.n_tokens / train_s, None if n_tokens is None else n_tokens / train_s)
    return [
        losses,
        f"{result.steps} steps, {result.train_s:.0f} s of training, {describe_rate(rate)}, "
        f"peak memory {result.peak_memory_bytes / 1e9:.2f} GB",
    ]


def describe_saved(result: TrainResult) -> str:
    """Return in words which weights were saved."""
    step, is_last = result.saved_step, result.saved_step == result.steps
    if step == result.best_step:
        return f"step {step}, the best and the last" if is_last else f"step {step}, the best"
    return f"step {step}, the last" if is_last else f"step {step}, the best after the start"


def _loss_text(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "not finite"
