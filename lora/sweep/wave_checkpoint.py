"""The checkpoint of an unfinished wave, and each candidate's state between two waves.

    runs/NAME/checkpoints/                 the wave: all of its candidates' tensors together
    runs/NAME/checkpoints-1/               of several processes, that of rank 1
    runs/NAME/candidates/NAME/state/       one candidate's tensors, from one wave to the next

Only the newest checkpoint is kept. A candidate whose best evaluation was at an earlier step has the
values of that step in it too.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora.errors import CheckpointError, gather
from lora.runs.directory import Run
from lora.runs.sweep_record import (
    CandidateState,
    SweepRecord,
    upgraded_candidates,
    write_sweep_record,
)
from lora.runs.typed_json import Faults, parse, to_json
from lora.sweep.context import SweepContext
from lora.training.checkpoint import list_checkpoints, load_newest, save_checkpoint

CHECKPOINTS, STATE = "checkpoints", "state"
TensorState = dict[str, Tensor]
"""One adapter's values, optimizer moments and dropout generator, by name: StackedTrainer.state.

With `best.` before their names, the values of its best evaluation, if that was at another step."""
VALUE, BEST = "value.", "best."
"""How the names of values begin, and those of the best ones."""


def with_best(tensors: TensorState, best: TensorState) -> TensorState:
    """Return a candidate's tensors together with the values of its best evaluation."""
    return tensors | {BEST + name: tensor for name, tensor in best.items()}


def split_best(tensors: TensorState) -> tuple[TensorState, TensorState]:
    """Return a candidate's tensors as the trainer restores them, and those of `with_best`."""
    best = {n.removeprefix(BEST): t for n, t in tensors.items() if n.startswith(BEST)}
    return {n: t for n, t in tensors.items() if not n.startswith(BEST)}, best


def values_to_save(tensors: TensorState) -> tuple[TensorState, bool]:
    """Return the values that become the adapter, by parameter, and whether they are of the best."""
    own, best = split_best(tensors)
    chosen = best or own
    return {n.removeprefix(VALUE): t for n, t in chosen.items() if n.startswith(VALUE)}, bool(best)


@dataclass(frozen=True)
class WavePosition:
    """How far a wave is: the `state.json` of its checkpoint."""

    numbers: list[int]
    """Of its candidates, from 1."""
    candidates: list[CandidateState]
    until: int
    """The step that the wave leads to."""
    wave_step: int
    """The candidates' step."""
    steps_before: int
    """`SweepRecord.steps_taken` when the wave began: detects a wave that the record has already."""

    def __post_init__(self) -> None:
        if len(self.numbers) != len(self.candidates) or not self.numbers:
            raise ValueError(f"{len(self.numbers)} numbers for {len(self.candidates)} candidates")


@dataclass(frozen=True)
class SavedWave:
    """A wave's checkpoint in memory."""

    position: WavePosition
    tensors: list[TensorState]
    """One for each candidate."""


def wave_folder(run: Run, rank: int) -> Path:
    """Return the directory of the checkpoint of the wave that process `rank` trains."""
    return run.folder / (f"{CHECKPOINTS}-{rank}" if rank else CHECKPOINTS)


def save_wave(context: SweepContext, saved: SavedWave, number: int) -> None:
    """Write the checkpoint of this process's wave as that of step `number` of the sweep.

    Raises CheckpointError if the disk refuses; the former checkpoint is then untouched.
    """
    tensors = {f"{k}.{name}": t for k, own in enumerate(saved.tensors) for name, t in own.items()}
    folder = wave_folder(context.run, context.world.rank)
    save_checkpoint(folder, number, tensors, to_json(saved.position), keep=1)


def load_wave(
    context: SweepContext, record: SweepRecord, rank: int | None = None
) -> SavedWave | None:
    """Return the checkpoint of the unfinished wave of `rank` (None: this process), if there is one.

    Raises CheckpointError if there are checkpoints and none of them can be used.
    """
    folder = wave_folder(context.run, context.world.rank if rank is None else rank)
    if not list_checkpoints(folder):
        return None
    tensors, state = load_newest(folder, context.progress.message)
    position = _parse_position(state, folder)
    names = {candidate.number: candidate.name for candidate in context.candidates}
    if [names.get(number) for number in position.numbers] != [c.name for c in position.candidates]:
        raise CheckpointError(
            f"Cannot resume from {folder}: its candidates {position.numbers} are not those of this "
            "sweep. Use a copy of the run directory, or start a new sweep."
        )
    if position.steps_before != record.steps_taken:  # killed before the last line of `close_wave`
        shutil.rmtree(folder, ignore_errors=True)
        return None
    own = [_own_tensors(tensors, k) for k in range(len(position.numbers))]
    return SavedWave(position, own)


def load_waves(context: SweepContext, record: SweepRecord) -> dict[int, SavedWave]:
    """Return the unfinished waves of all processes that the sweep had, by rank."""
    found = {}
    for folder in context.run.folder.glob(f"{CHECKPOINTS}*"):
        rank = folder.name.removeprefix(CHECKPOINTS).removeprefix("-") or "0"
        saved = load_wave(context, record, int(rank)) if rank.isdecimal() else None
        if saved is not None:
            found[int(rank)] = saved
    return dict(sorted(found.items()))


def remove_waves(context: SweepContext, record: SweepRecord, n_steps: int) -> None:
    """Write the record with `n_steps` steps more, then remove the checkpoints of all waves."""
    record.steps_taken += n_steps
    write_sweep_record(context.run, record)
    for folder in context.run.folder.glob(f"{CHECKPOINTS}*"):
        shutil.rmtree(folder, ignore_errors=True)


def close_wave(
    context: SweepContext, record: SweepRecord, numbers: Sequence[int], n_steps: int
) -> None:
    """Write the record with the wave of these candidates, then remove its checkpoint.

    Changes `record` in place: every process gets the states of the others' candidates. In this
    order: a kill between the two leaves checkpoints that `load_wave` recognises as done.
    """
    world, what = context.world, "the candidates of all processes"
    own = {number: record.candidates[number - 1] for number in numbers}
    for states, steps in world.gather((own, n_steps), what):
        record.steps_taken += steps
        for number, state in states.items():
            record.candidates[number - 1] = state
    world.on_main(lambda: write_sweep_record(context.run, record), "the record of the sweep")
    shutil.rmtree(wave_folder(context.run, world.rank), ignore_errors=True)


def save_candidate(run: Run, state: CandidateState, tensors: TensorState) -> None:
    """Write what one candidate needs to continue in another wave.

    Raises CheckpointError if the disk refuses.
    """
    save_checkpoint(run.folder / STATE, state.step, tensors, {}, keep=1)


def load_candidate(context: SweepContext, run: Run) -> TensorState:
    """Return what `save_candidate` wrote. Raises CheckpointError if it cannot be used."""
    return load_newest(run.folder / STATE, context.progress.message)[0]


def remove_candidate_state(run: Run) -> None:
    """Remove what `save_candidate` wrote, if anything."""
    shutil.rmtree(run.folder / STATE, ignore_errors=True)


def _own_tensors(tensors: TensorState, k: int) -> TensorState:
    start = f"{k}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def _parse_position(state: dict[str, Any], folder: Path) -> WavePosition:
    faults: Faults = []
    position = parse(WavePosition, upgraded_candidates(state), str(folder), faults)
    if position is None or faults:
        advice = "Use a copy of the run directory, or start a new sweep."
        raise CheckpointError(gather(faults, f"Cannot resume from {folder}:", advice))
    return position
