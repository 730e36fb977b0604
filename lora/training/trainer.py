"""The one training loop: takes steps, evaluates, saves, and stops when asked to.

What a job is and how its state is saved is in `lora.training.job`, the steps themselves behind
`lora.training.step_runner`.
"""

from __future__ import annotations

import itertools
import math
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from lora.device import peak_memory_bytes, visible_gpus
from lora.distributed.world import ALONE
from lora.errors import Interrupted, TrainingError
from lora.runs.interrupts import StopRequests
from lora.runs.record import MetricsRow, TimingRow
from lora.training.callbacks import Callback, EvalEvent, SaveEvent, StepEvent, call_all
from lora.training.checkpoint import checkpoint_path
from lora.training.heap import retain_freed_memory
from lora.training.job import (
    LoopState,
    TrainingJob,
    TrainResult,
    resume_loop_state,
    save_loop_state,
)
from lora.training.optim import learning_rate_at
from lora.training.out_of_memory import advise, count_parts, describe_parts, explain_out_of_memory
from lora.training.outcome import finish_run, token_rate
from lora.training.sharded_step import ShardedStepRunner
from lora.training.step_runner import StepOutcome

SPIKE_WINDOW_STEPS, MIN_SPIKE_STEPS = 32, 8
"""Losses that a new one is compared with, and how few of them allow no judgement."""
SPIKE_DEVIATIONS, SPIKE_FRACTION = 6.0, 0.5
"""How far above the median a spike is: in deviations, and as a fraction of the median."""


def train(job: TrainingJob) -> TrainResult:
    """Changes `job.model` in place: run the job to its end, or from its newest checkpoint on.

    At the end the model has the best weights by validation loss, or with `run_config.save` "last"
    those of the last step.

    Raises TrainingError if one step more than `run_config.skip_nonfinite` is not finite, if all
    steps were skipped, or if memory runs out, Interrupted after a signal (the state is
    saved), CheckpointError if none can be used. What a callback raises, StopTraining apart, comes
    out after a checkpoint is saved.
    """
    job.model.train()
    job.run.on_trouble = job.progress.message
    job.world.asked.clear()  # of a run before
    state = resume_loop_state(job) if job.resume else LoopState()
    job.progress.start(job.train_config.n_steps, state.step)
    try:
        with (
            StopRequests(job.progress.message) as stop,
            explain_out_of_memory(lambda: _describe_memory(job, state)),
            retain_freed_memory(),
        ):
            _loop(job, state, stop)
    finally:
        job.progress.stop()
    if 0 < state.step == state.skipped_steps:
        raise TrainingError(
            f"Cannot train: loss or gradient of all {state.step} steps were not finite, so nothing "
            "was learned and no adapter is saved. Lower the learning rate, or look for damaged "
            "examples; metrics.jsonl has the steps."
        )
    number = _signal_to_stop_at(job, state, stop)
    if number and not _is_over(job, state):
        raise Interrupted(_describe_interruption(job, state, number), 128 + number)
    return finish_run(job, state)


def is_spike(loss: float, recent: list[float]) -> bool:
    """Is `loss` far above `recent`: six deviations from their median and half of it more?

    The deviation is the median absolute one, as of a normal distribution; with fewer than
    MIN_SPIKE_STEPS losses nothing is a spike. Spikes are reported and marked, never acted upon.
    """
    if len(recent) < MIN_SPIKE_STEPS or not math.isfinite(loss):
        return False
    median = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in recent)
    return loss - median > max(SPIKE_DEVIATIONS * deviation, SPIKE_FRACTION * abs(median))


def _loop(job: TrainingJob, state: LoopState, stop: StopRequests) -> None:
    """Take steps, evaluate and save until the run is over or a signal asks to stop."""
    if state.step == 0:
        _evaluate(job, state)
    n_steps = job.train_config.n_steps
    eval_every = job.run_config.eval_interval(n_steps)
    save_every = job.run_config.save_interval(n_steps)
    state.marked_s, tried_step = time.perf_counter(), None
    while not _is_over(job, state) and not _signal_to_stop_at(job, state, stop):
        step = state.step + 1
        evaluates = step % eval_every == 0 or step == n_steps
        saves = step % save_every == 0 or step == n_steps
        _take_step(job, state, stop, wait=evaluates or saves)
        if state.stop_asked:  # by a callback: the end of a run is evaluated
            _finish_steps(job, state)
            evaluates = state.stopped_early = True
        is_best = evaluates and _evaluate(job, state)
        # The best is saved when it is found: the next regular save would be of other weights.
        if saves or is_best or state.stopped_early:
            _save(job, state, is_best=is_best)
            tried_step = state.step
        if evaluates or saves:
            state.marked_s = time.perf_counter()  # neither belongs to the next step's time
    _finish_steps(job, state)  # of an interrupted run
    # At step 0 there is nothing to save: a resumed run begins again.
    if state.step and state.step not in (state.saved_step, tried_step):
        _save(job, state)


def _is_over(job: TrainingJob, state: LoopState) -> bool:
    return state.step >= job.train_config.n_steps or state.stopped_early


def _signal_to_stop_at(job: TrainingJob, state: LoopState, stop: StopRequests) -> int:
    """Return the number of the signal that ends the run, 0 without one.

    Several processes end in the same step: at what they have agreed on, not at what one received.
    """
    return (stop.received or 0) if job.world.is_alone else state.agreed_signal


def _save(job: TrainingJob, state: LoopState, *, is_best: bool = False) -> None:
    save_loop_state(job, state, is_best=is_best)
    if job.callbacks and state.saved_step == state.step:
        path = checkpoint_path(job.run.folder / "checkpoints", state.step)
        event = SaveEvent(*_place(job, state.step), path, is_best)
        _notify(job, state, lambda callback: callback.on_save(event))


def _place(job: TrainingJob, step: int) -> tuple[int, int, Path, nn.Module]:
    """Return what every event has."""
    return step, job.train_config.n_steps, job.run.folder, job.shown_model or job.model


def _notify(job: TrainingJob, state: LoopState, call: Callable[[Callback], None]) -> None:
    """Call the callbacks; if one raises, save what was learned before the exception goes on."""
    is_done = False
    try:
        why = call_all(job.callbacks, call)
        is_done = True
    finally:
        if not is_done:
            _save_after_error(job, state)
    asked = job.world.asked
    if why is not None and not (state.stop_asked or asked.callback):
        if job.world.is_alone:
            state.stop_asked = True
        else:  # the others learn of it with the next step
            asked.callback = True
        job.progress.message(f"step {state.step}: {why}")


def _save_after_error(job: TrainingJob, state: LoopState) -> None:
    # Alone: the other processes do not know of the error, and wait for the next step.
    quiet = replace(job, callbacks=(), world=ALONE)
    _finish_steps(quiet, state)
    if not state.step or state.saved_step == state.step:
        return
    if isinstance(job.steps, ShardedStepRunner):
        job.progress.message(
            f"a callback failed: step {state.step} is not saved, because the other processes have "
            "parts of the weights; resume continues from the newest checkpoint"
        )
        return
    is_best = state.best_eval_step == state.step and state.eval_loss < state.best_saved_loss
    n_steps = job.train_config.n_steps
    is_due = state.step % job.run_config.eval_interval(n_steps) == 0 or state.step == n_steps
    is_due = is_due and job.world.is_alone
    if is_due and state.evaluated_step != state.step:  # a resumed run would not make it
        is_best = _evaluate(quiet, state)
    save_loop_state(quiet, state, is_best=is_best)
    if state.saved_step == state.step:
        job.progress.message(f"a callback failed: step {state.step} is saved, resume continues it")


def _describe_memory(job: TrainingJob, state: LoopState) -> str:
    config, peak_bytes = job.train_config, peak_memory_bytes(job.choice.device)
    parts = job.memory_plan or count_parts(job.model, peak_bytes)
    kind = "counted" if job.memory_plan is None else "planned"
    has_lora = not all(p.requires_grad for p in job.model.parameters())
    # Only jobs with a plan are commands, which --devices spreads over GPUs.
    n_gpus = 0 if job.memory_plan is None else visible_gpus(job.choice.device)
    saved = "No checkpoint was written yet."
    if state.saved_step is not None:
        saved = f"The checkpoint of step {state.saved_step} is whole: --resume goes on from there."
    return (
        f"at step {state.step} of {config.n_steps} on {job.choice.device}, after a peak of "
        f"{peak_bytes / 1e9:.2f} GB. It was {kind} to take {describe_parts(parts)}. "
        f"{advise(parts, config, has_lora=has_lora, n_gpus=n_gpus)} {saved}"
    )


def _describe_interruption(job: TrainingJob, state: LoopState, number: int) -> str:
    name = signal.Signals(number).name
    saved_step, total = state.saved_step, job.train_config.n_steps
    saved = "nothing could be saved" if state.step else "nothing was trained yet"
    saved = saved if saved_step is None else f"step {saved_step} is saved"
    return (
        f"{name} stopped {job.run.folder} after step {state.step} of {total}; {saved}. Give "
        "--resume to continue."
    )


def _take_step(job: TrainingJob, state: LoopState, stop: StopRequests, *, wait: bool) -> None:
    """Launch the next step and record those that are done: all of them if `wait`."""
    if not job.world.is_alone:
        job.world.asked.signal = stop.received or 0
    learning_rate = learning_rate_at(state.step, job.train_config)
    state.step += 1
    micro_batches = [next(job.stream) for _ in range(job.train_config.gradient_accumulation)]
    job.steps.launch(state.step, micro_batches, [learning_rate])
    _finish_steps(job, state, wait=wait)


def _finish_steps(job: TrainingJob, state: LoopState, *, wait: bool = True) -> None:
    """Record the steps that are done, all of them if `wait`; then tell the callbacks."""
    outcomes = job.steps.finished(wait=wait)
    totals = [_record(job, state, outcome) for outcome in outcomes]
    if not job.callbacks:
        return
    for outcome, n_tokens in zip(outcomes, totals, strict=True):
        if not outcome.not_finite:
            event = StepEvent(
                *_place(job, outcome.step),
                outcome.losses[0],
                outcome.learning_rates[0],
                outcome.gradient_norms[0],
                n_tokens,
            )
            _notify(job, state, partial(_call_on_step, event))


def _call_on_step(event: StepEvent, callback: Callback) -> None:
    callback.on_step(event)


def _record(job: TrainingJob, state: LoopState, outcome: StepOutcome) -> int:
    """Record the outcome of a step; return the target tokens of the run so far."""
    # A step's time is that from one record to the next: on a GPU steps are read one late, so
    # neither the launch nor the wait alone says how long one takes.
    now_s = time.perf_counter()
    step_s, state.marked_s = now_s - state.marked_s, now_s
    state.stop_asked |= outcome.stops.callback
    state.agreed_signal = state.agreed_signal or outcome.stops.signal
    if outcome.not_finite:
        _skip(job, state, outcome)
        return state.n_tokens
    state.n_tokens += outcome.n_tokens
    state.train_s += step_s
    (loss,), step = outcome.losses, outcome.step
    spikes = is_spike(loss, state.recent_losses)
    if spikes:
        usual = statistics.median(state.recent_losses)
        job.progress.message(f"step {step}: the loss jumps to {loss:.4g} from {usual:.4g}")
    state.recent_losses = [*state.recent_losses, loss][-SPIKE_WINDOW_STEPS:]
    state.first_loss = loss if state.first_loss is None else state.first_loss
    job.run.append_metrics(
        MetricsRow(
            step=step,
            loss=loss,
            learning_rate=outcome.learning_rates[0],
            gradient_norm=outcome.gradient_norms[0],
            tokens=state.n_tokens,
            spike=spikes or None,  # a row has the key only where there is one
        )
    )
    memory = peak_memory_bytes(job.choice.device)
    job.run.append_timing(TimingRow(step=step, step_s=step_s, peak_memory_bytes=memory))
    job.progress.step(step, loss, token_rate(job, state), memory)
    return state.n_tokens


def _skip(job: TrainingJob, state: LoopState, outcome: StepOutcome) -> None:
    """Count a step that was not taken. Raises TrainingError if that is one too many."""
    state.skipped_steps += 1
    step, bad = outcome.step, outcome.bad_sequences
    allowed, total = job.run_config.skip_nonfinite, job.train_config.n_steps
    message = f"Step {step} of {total}: {outcome.not_finite[0]}"
    if bad is not None and (named := job.name_examples(step, bad)):
        message += f" {named}"
    if state.skipped_steps > allowed:
        raise TrainingError(message)
    job.run.append_metrics(MetricsRow(step=step, skipped=state.skipped_steps))
    job.progress.message(f"{message} Skipped: {state.skipped_steps} of at most {allowed}.")


def _evaluate(job: TrainingJob, state: LoopState) -> bool:
    """Evaluate and record it; return whether its checkpoint would be the best on the disk."""
    batches = iter(job.eval_batches())
    first = next(batches, None)
    if first is None:  # there are no validation data
        return False
    state.evaluated_step = state.step
    (state.eval_loss,) = job.steps.evaluate(itertools.chain((first,), batches))
    if not math.isfinite(state.eval_loss):
        seen = str(state.eval_loss)
        job.run.append_metrics(MetricsRow(step=state.step, eval_not_finite=seen))
        job.progress.message(
            f"step {state.step}: the validation loss is {state.eval_loss}, not finite: look for "
            "damaged validation examples, or lower the learning rate"
        )
        state.eval_loss = math.nan
        job.on_eval(state.step)
        _tell_of_evaluation(job, state, is_best=False)
        return False
    job.run.append_metrics(MetricsRow(step=state.step, eval_loss=state.eval_loss))
    job.progress.message(f"step {state.step}: validation loss {state.eval_loss:.4f}")
    is_best = state.eval_loss < state.best_eval_loss
    if is_best:
        state.best_eval_loss, state.best_eval_step = state.eval_loss, state.step
    state.evals_since_best = 0 if is_best else state.evals_since_best + 1
    patience = job.run_config.patience
    if patience and state.evals_since_best >= patience:
        state.stopped_early = True
        job.progress.message(
            f"no better loss in {patience} evaluations: stopping at step {state.step}"
        )
    job.on_eval(state.step)
    if state.step == 0:  # not saved: the model as it came
        state.start_eval_loss = state.eval_loss
    _tell_of_evaluation(job, state, is_best=is_best)
    if state.step == 0:
        return False
    # After a save that the disk refused, one that is not the best of the run may be the best there.
    return state.eval_loss < state.best_saved_loss


def _tell_of_evaluation(job: TrainingJob, state: LoopState, *, is_best: bool) -> None:
    world = job.world
    if job.callbacks:
        losses = state.eval_loss, state.best_eval_loss
        event = EvalEvent(*_place(job, state.step), *losses, is_best)
        _notify(job, state, lambda callback: callback.on_eval(event))
    asks = state.stop_asked or world.asked.callback
    state.stopped_early |= world.from_main(asks, f"samples and callbacks after step {state.step}")
