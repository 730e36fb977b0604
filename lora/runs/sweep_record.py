"""The record of a sweep on disk, as typed, versioned dataclasses.

    runs/NAME/
      run.json        RunRecord, whose `sweep` is SweepSettings
      sweep.json      SweepRecord: how far each candidate is
      timings.jsonl   WaveTiming, a row a wave
      result.json     SweepOutcome, once the sweep is over

Readers take `faults` as those of lora.runs.read_record do. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora.runs.directory import Run
from lora.runs.read_record import file_version, read_record_file, read_row_file
from lora.runs.record import RESULT_FILE, TIMINGS_FILE
from lora.runs.typed_json import Faults, to_json

SWEEP_FILE = "sweep.json"
SCHEMA_VERSION = 2
"""Of `sweep.json`. Version 1 had no number, called the candidates `standings` and named the rung
at which one was stopped only in the words of `reason`."""

Status = Literal["waiting", "training", "stopped", "failed", "done"]


@dataclass
class CandidateState:
    """How far the training of one candidate is, and its losses."""

    name: str
    """Also of its directory."""
    settings: dict[str, Any]
    """Values of the settings that a sweep can vary, by name."""
    status: Status = "waiting"
    step: int = 0
    """Optimizer steps taken."""
    stopped_at: int | None = None
    """The rung (a step) at which halving stopped it; None unless `status` is stopped."""
    reason: str = ""
    """Why it was stopped or failed, for the user: no code depends on it."""
    loss: float | None = None
    """Training loss of the newest step, nats."""
    eval_loss: float | None = None
    """Newest validation loss, nats."""
    best_eval_loss: float | None = None
    best_step: int | None = None
    """The step of `best_eval_loss`."""
    saved_step: int | None = None
    """The step whose weights its adapter has; None until it is saved, and in files of older
    versions, which saved the last."""
    saved_eval_loss: float | None = None
    """Validation loss of these weights, nats."""
    row: int = 0
    """Training sequences consumed: the position of its batch stream."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise ValueError(f"{self.name!r} is no name of a folder")
        if min(self.step, self.row, self.stopped_at or 0) < 0:
            raise ValueError(f"step {self.step}, row {self.row}: a number below 0")
        if (self.stopped_at is None) is (self.status == "stopped"):
            raise ValueError(f"status {self.status} with stopped_at {self.stopped_at}")

    @property
    def is_alive(self) -> bool:
        """Whether it may be trained further."""
        return self.status in ("waiting", "training")

    def note_eval(self, loss: float) -> bool:
        """Record a validation loss at the present step; return whether it is the best so far."""
        self.eval_loss = loss
        is_best = self.best_eval_loss is None or loss < self.best_eval_loss
        if is_best:
            self.best_eval_loss, self.best_step = loss, self.step
        return is_best

    @property
    def result_loss(self) -> float | None:
        """Validation loss of its adapter once it has finished, the newest before."""
        has_saved = self.status == "done" and self.saved_eval_loss is not None
        return self.saved_eval_loss if has_saved else self.eval_loss

    def note_saved(self, *, best: bool) -> None:
        """Record that its adapter was saved, with the best weights or those of the present step."""
        self.saved_step = self.best_step if best else self.step
        self.saved_eval_loss = self.best_eval_loss if best else self.eval_loss

    def fail(self, reason: str) -> None:
        """Stop training it: its loss or gradient is not finite."""
        self.status, self.reason = "failed", reason

    def stop(self, rung: int, reason: str) -> None:
        """Stop training it: halving at step `rung` kept better candidates."""
        self.status, self.stopped_at, self.reason = "stopped", rung, reason


@dataclass
class SweepRecord:
    """All of sweep.json: the candidates, and how far the sweep is."""

    candidates: list[CandidateState]
    rungs: tuple[int, ...]
    """Steps at which candidates are compared; the last ends the sweep."""
    at_once: int
    """Candidates in a stack, at most; each process has one."""
    base_eval_loss: float | None = None
    """Validation loss of the model without an adapter, nats."""
    steps_taken: int = 0
    """Steps of all finished waves, each counted once for all of its candidates."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not self.rungs or min(self.rungs) < 0 or self.at_once < 1 or self.steps_taken < 0:
            raise ValueError(
                f"rungs {self.rungs}, at_once {self.at_once}, steps_taken {self.steps_taken}: "
                "a number is out of range"
            )


@dataclass(frozen=True)
class WaveTiming:
    """A row of timings.jsonl: one wave, as one process measured it."""

    step: int
    """Steps of all waves until then."""
    train_s: float
    """Seconds in steps; evaluations and saves left out."""
    timed_steps: int
    """Steps that `train_s` is the time of; steps before a kill are not among them."""
    peak_memory_bytes: int
    wave_s: float | None = None
    """Seconds of the whole wave."""
    candidates: list[str] = field(default_factory=list)
    """Their names."""
    until: int | None = None
    """The step that the wave led to."""
    rank: int | None = None
    """The process that trained it; None: the only one."""


@dataclass(frozen=True)
class SweepOutcome:
    """All of result.json of a sweep."""

    best: str
    """Name of the candidate whose saved adapter has the lowest validation loss."""
    eval_loss: float | None
    """Of that adapter, nats."""
    train_s: float
    """Seconds in steps of the process that finished the sweep; of several, of the slowest in each
    round."""


def write_sweep_record(run: Run, record: SweepRecord) -> None:
    """Write `sweep.json`, whole or not at all. Raises CheckpointError if the disk refuses."""
    run.write_json(SWEEP_FILE, to_json(record))


def read_sweep_record(directory: Path, faults: Faults | None = None) -> SweepRecord | None:
    """Return what `sweep.json` holds, of version 1 too; None if there is no such file."""
    path = directory / SWEEP_FILE
    return read_record_file(SweepRecord, path, faults, upgrade=_upgraded)


def write_outcome(run: Run, outcome: SweepOutcome) -> None:
    """Write `result.json`, whole or not at all. Raises CheckpointError if the disk refuses."""
    run.write_json(RESULT_FILE, to_json(outcome))


def read_outcome(directory: Path, faults: Faults | None = None) -> SweepOutcome | None:
    """Return what `result.json` holds; None if the sweep is not finished."""
    return read_record_file(SweepOutcome, directory / RESULT_FILE, faults)


def append_wave_timing(run: Run, timing: WaveTiming) -> None:
    """Add a row to `timings.jsonl`."""
    run.append_timing(timing)


def read_wave_timings(directory: Path, faults: Faults | None = None) -> list[WaveTiming]:
    """Return the rows of `timings.jsonl`; none if there is no such file."""
    return read_row_file(WaveTiming, directory / TIMINGS_FILE, faults)


def rank(candidates: Iterable[CandidateState]) -> list[CandidateState]:
    """Return the candidates, the best first: by progress, then by validation loss.

    Candidates that were stopped follow those that train; those that failed come last.
    """
    groups: dict[Status, int] = {"done": 0, "training": 0, "waiting": 1, "stopped": 2, "failed": 3}
    return sorted(
        candidates, key=lambda c: (groups[c.status], -(c.stopped_at or 0), *loss_order(c))
    )


def loss_order(candidate: CandidateState) -> tuple[float, str]:
    """Return the key that sorts candidates by validation loss, those without one last.

    The loss of a finished one is that of its adapter, of the others the newest.
    """
    loss = candidate.result_loss
    return (math.inf if loss is None or math.isnan(loss) else loss, candidate.name)


def find_best(candidates: Sequence[CandidateState]) -> CandidateState | None:
    """Return the finished candidate with the lowest loss; None if none has finished."""
    done = [c for c in candidates if c.status == "done"]
    return min(done, key=loss_order, default=None)


def _upgraded(values: dict[str, Any], where: str, faults: Faults) -> dict[str, Any]:
    """Return the values of a `sweep.json` as version 2 has them."""
    version = file_version(values, 1, SCHEMA_VERSION, where, faults)
    return values if version == SCHEMA_VERSION else upgraded_candidates(values)


def upgraded_candidates(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of version 1 with the name and the fields of version 2's candidates.

    A stopped candidate took no step after its rung, so its step is the rung.
    """
    found = values.get("standings")
    if not isinstance(found, list):
        return values
    rest = {key: value for key, value in values.items() if key != "standings"}
    candidates = [
        {**c, "stopped_at": c.get("step")}
        if isinstance(c, dict) and c.get("status") == "stopped"
        else c
        for c in found
    ]
    return {**rest, "candidates": candidates}
