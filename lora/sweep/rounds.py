"""Rounds of a sweep: in each, every process trains one wave, then all agree on the record.

A process alone trains one wave a round. Several deal out the candidates of a round, train without
any traffic between them, and meet at its end: there candidates are compared, and rank 0 writes the
record. Each process saves the candidates that it trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lora.device import peak_memory_bytes
from lora.errors import Interrupted
from lora.runs.interrupts import StopRequests
from lora.runs.sweep_record import (
    SweepRecord,
    WaveTiming,
    append_wave_timing,
    write_sweep_record,
)
from lora.sweep.context import SweepContext, candidate_run
from lora.sweep.grid import Candidate
from lora.sweep.halving import halve_reached_rungs, next_group
from lora.sweep.meeting import Meeting
from lora.sweep.progress import KeptMessages
from lora.sweep.wave import (
    TrainedWave,
    finish_idle,
    finish_wave,
    save_members,
    split_members,
    train_wave,
)
from lora.sweep.wave_checkpoint import (
    SavedWave,
    TensorState,
    load_wave,
    load_waves,
    remove_waves,
)
from lora.sweep.wave_loop import TrainedMember, WavePlan

SaveAdapter = Callable[[Candidate, TensorState], None]


def train_rounds(
    context: SweepContext, record: SweepRecord, stop: StopRequests, save: SaveAdapter
) -> float:
    """Train round after round until no candidate is left; return the seconds of their steps.

    Raises Interrupted after a signal, the state saved.
    """
    _settle_saved_waves(context, record, save)
    meeting, train_s = Meeting(context.world), 0.0
    while (plan := _next_wave(context, record)) is not None:
        train_s += _run_round(context, record, plan, stop, save, meeting)
    return train_s


def _settle_saved_waves(context: SweepContext, record: SweepRecord, save: SaveAdapter) -> None:
    """Finish or split the waves that an interrupted sweep left, unless they continue as they are.

    They do where as many processes have the same candidates as before.
    """
    world = context.world

    def settle() -> SweepRecord:
        waves = load_waves(context, record)
        if not waves or _may_continue(record, waves, world.size):
            return record
        n_steps = sum(settle_wave(context, record, saved, save) for saved in waves.values())
        remove_waves(context, record, n_steps)
        return record

    settled = world.on_main(settle, "unfinished waves")
    record.candidates, record.steps_taken = settled.candidates, settled.steps_taken


def _may_continue(record: SweepRecord, waves: dict[int, SavedWave], n_processes: int) -> bool:
    if n_processes == 1:
        return waves.keys() == {0} and len(waves[0].position.numbers) <= record.at_once
    group, until = next_group(record, n_processes) or ([], 0)
    return all(
        saved.position.until == until
        and saved.position.numbers == [index + 1 for index in group[rank::n_processes]]
        for rank, saved in waves.items()
    )


def settle_wave(
    context: SweepContext, record: SweepRecord, saved: SavedWave, save: SaveAdapter
) -> int:
    """Finish a saved wave that was complete but never closed, and split any other.

    Changes the states in `record` in place; `remove_waves` writes it. Returns the wave's steps.
    """
    position = saved.position
    first_step = record.candidates[position.numbers[0] - 1].step
    members = []
    for number, state, tensors in zip(
        position.numbers, position.candidates, saved.tensors, strict=True
    ):
        candidate = context.candidates[number - 1]
        record.candidates[number - 1] = state
        run = candidate_run(context.run, candidate)
        members.append(TrainedMember(candidate, state, run, tensors))
    if position.wave_step >= position.until:
        save_members(members, save, is_last=position.until == record.rungs[-1])
    else:
        split_members(members)
        context.progress.message(
            f"splitting the wave of {len(members)} that was at step {position.wave_step}"
        )
    return position.wave_step - first_step


def _next_wave(context: SweepContext, record: SweepRecord) -> WavePlan | None:
    """Return this process's wave of the next round, an interrupted one first; None at the end.

    It has no candidates where there are fewer than processes.
    """
    candidates, message, world = context.candidates, context.progress.message, context.world
    stopped = halve_reached_rungs(record)
    if stopped:
        message(f"halving stops {', '.join(c.name for c in stopped)}")
        world.on_main(lambda: write_sweep_record(context.run, record), "the record of the sweep")
    saved = load_wave(context, record)
    if saved is not None:
        position = saved.position
        message(f"resuming {len(position.numbers)} candidates at step {position.wave_step}")
        return WavePlan([candidates[n - 1] for n in position.numbers], position.until, saved)
    group = next_group(record, world.size)
    if group is None:
        return None
    own = group[0][world.rank :: world.size]
    return WavePlan([candidates[n] for n in own], group[1])


def _run_round(
    context: SweepContext,
    record: SweepRecord,
    plan: WavePlan,
    stop: StopRequests,
    save: SaveAdapter,
    meeting: Meeting,
) -> float:
    """Train one wave in each process and record them; return the seconds of their steps.

    Raises Interrupted after a signal, the state saved.
    """
    if isinstance(context.progress, KeptMessages):
        context.progress.take()  # what all processes had to say
    began_s = time.perf_counter()
    wave = train_wave(context, record, plan, stop) if plan.candidates else None
    if wave is not None and not wave.is_over:
        raise Interrupted(_interrupted_message(context, wave, stop), stop.exit_code)
    others = "the candidates of the other processes"
    if not meeting.wait(others, lambda: stop.received is not None, context.progress.message):
        raise Interrupted(_interrupted_message(context, wave, stop), stop.exit_code)
    if wave is None:
        finish_idle(context, record)
    else:
        finish_wave(context, record, wave, save)
    wave_s = time.perf_counter() - began_s
    train_s = _record_timings(context, record, plan, wave, wave_s)
    _pass_on_messages(context)
    # A signal reaches one process a moment before another: they stop in the same round.
    is_stopped = context.world.any(stop.received is not None, "signals")
    if is_stopped and next_group(record) is not None:
        raise Interrupted(_interrupted_message(context, wave, stop), stop.exit_code)
    return train_s


def _record_timings(
    context: SweepContext,
    record: SweepRecord,
    plan: WavePlan,
    wave: TrainedWave | None,
    wave_s: float,
) -> float:
    """Record the times of this round; return the seconds of the slowest process's steps."""
    own, world = None, context.world
    if wave is not None:
        own = WaveTiming(
            step=record.steps_taken,
            train_s=wave.train_s,
            timed_steps=wave.timed_steps,
            peak_memory_bytes=peak_memory_bytes(context.choice.device),
            wave_s=wave_s,
            candidates=[candidate.name for candidate in plan.candidates],
            until=plan.until,
            rank=None if world.is_alone else world.rank,
        )
    timings = [each for each in world.gather(own, "the times of the round") if each is not None]
    for timing in timings:
        append_wave_timing(context.run, timing)
    return max((timing.train_s for timing in timings), default=0.0)


def _pass_on_messages(context: SweepContext) -> None:
    """Show on rank 0 what the other processes had to say in this round."""
    progress, world = context.progress, context.world
    own = progress.take() if isinstance(progress, KeptMessages) else []
    for rank, messages in enumerate(world.gather(own, "messages")):
        for message in messages if world.is_main else ():
            progress.message(f"rank {rank}: {message}")


def _interrupted_message(
    context: SweepContext, wave: TrainedWave | None, stop: StopRequests
) -> str:
    name = stop.received.name if stop.received else "A signal to another process"
    where = "between two waves"
    if wave is not None:
        where = f"after step {wave.step} of a wave of {len(wave.members)} candidates"
    return f"{name} stopped {context.run.folder} {where}; its state is saved. Resume with --resume."
