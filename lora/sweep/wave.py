"""One wave of a sweep: K candidates train together on one model, from their step to the next rung.

`train_wave` does the whole of it, and only what it returns can be finished by `finish_wave`, so a
wave cannot be driven in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora.runs.interrupts import StopRequests
from lora.runs.sweep_record import SweepRecord
from lora.stacked.apply import stacked_adapters
from lora.sweep.context import SweepContext
from lora.sweep.grid import Candidate
from lora.sweep.wave_checkpoint import (
    TensorState,
    close_wave,
    remove_candidate_state,
    save_candidate,
    values_to_save,
)
from lora.sweep.wave_loop import TrainedMember, WaveLoop, WavePlan


@dataclass(frozen=True)
class TrainedWave:
    """What `train_wave` returns: the wave after this process's last step of it."""

    members: list[TrainedMember]
    step: int
    until: int
    n_steps: int
    """Steps since the wave began, those of earlier processes included."""
    timed_steps: int
    """Steps taken by this process."""
    train_s: float
    """Seconds of these."""
    is_over: bool
    """Whether the wave is complete, or all its candidates failed; false after a signal."""


def train_wave(
    context: SweepContext, record: SweepRecord, plan: WavePlan, stop: StopRequests
) -> TrainedWave:
    """Train the plan's candidates up to its step, or until a signal asks to stop; save on the way.

    Changes the candidates' states in `record`; `context.model` has the candidates' adapters only
    until this returns or raises. Raises CheckpointError if a saved state cannot be used.
    """
    seeds = [candidate.train.seed for candidate in plan.candidates]
    configs = [candidate.lora for candidate in plan.candidates]
    with stacked_adapters(context.model, configs, seeds) as stacked:
        wave = WaveLoop(context, record, plan, stacked)
        try:
            wave.train(stop)
        finally:
            wave.close()
        return TrainedWave(
            members=wave.trained_members(),
            step=wave.step,
            until=plan.until,
            n_steps=wave.step - wave.first_step,
            timed_steps=wave.step - wave.resumed_step,
            train_s=wave.train_s,
            is_over=wave.is_over,
        )


def finish_wave(
    context: SweepContext,
    record: SweepRecord,
    wave: TrainedWave,
    save_adapter: Callable[[Candidate, TensorState], None],
) -> None:
    """Save the adapters and what the next rung needs, then the record; remove the checkpoint.

    In several processes all call it, those without a wave by `finish_idle`. Raises ValueError for a
    wave that is not complete: it has to be resumed.
    """
    if not wave.is_over:
        raise ValueError(
            f"Cannot finish a wave at step {wave.step} of {wave.until}: it was interrupted. "
            "Resume it with its checkpoint."
        )
    save_members(wave.members, save_adapter, is_last=wave.until == record.rungs[-1])
    numbers = [member.candidate.number for member in wave.members]
    close_wave(context, record, numbers, wave.n_steps)


def finish_idle(context: SweepContext, record: SweepRecord) -> None:
    """Finish the wave of a process that had no candidate, together with the others'."""
    close_wave(context, record, (), 0)


def save_members(
    members: Sequence[TrainedMember],
    save_adapter: Callable[[Candidate, TensorState], None],
    *,
    is_last: bool,
) -> None:
    """Save the adapters of a complete wave and, unless it is their last, what the next one needs.

    Changes the members' states in place.
    """
    for member in members:
        if member.state.status == "training":
            save_adapter(member.candidate, member.tensors)
            member.state.note_saved(best=values_to_save(member.tensors)[1])
    if not is_last:
        split_members(members)
        return
    for member in members:
        if member.state.status == "training":
            member.state.status = "done"
            remove_candidate_state(member.run)


def split_members(members: Sequence[TrainedMember]) -> None:
    """Save each candidate of a wave by itself, so that other waves can continue it.

    Changes the members' states in place.
    """
    for member in members:
        if member.state.status == "training":
            member.state.status = "waiting"
            save_candidate(member.run, member.state, member.tensors)
