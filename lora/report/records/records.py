"""The content of a report, which report.json holds as JSON.

A value that a run directory does not hold is None, and shown as a dash. Losses are in nats per
target token, times in seconds, sizes in bytes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lora.runs.comparison_record import METHOD_NAMES, RateTrial, Ratios, RunFigures, Sample

SCHEMA_VERSION = 1
"""Of report.json; grows when a field changes its meaning or is removed."""
REPORT_KIND = "report"
"""The `kind` in report.json."""

NOT_QUANTISED = "not quantised"
"""Of a base that is stored in the compute dtype."""

Method = Literal["lora", "full", "peft", "unknown"]
Status = Literal["finished", "unfinished", "stopped", "failed"]


def method_name(method: Method) -> str:
    """Return a method's name for people."""
    return "unknown" if method == "unknown" else METHOD_NAMES[method]


@dataclass(frozen=True)
class Point:
    """A loss at a step."""

    step: int
    loss: float
    time_s: float | None = None
    """Training time until then; evaluations and saves left out."""


@dataclass(frozen=True)
class StepState:
    """What steered an optimizer step."""

    step: int
    learning_rate: float | None
    gradient_norm: float | None
    """Before clipping."""


@dataclass(frozen=True)
class Memory:
    """Peak memory in bytes: planned before the weights were loaded, and measured."""

    planned: dict[str, int]
    """By part, in the order they are drawn in."""
    planned_total: int
    measured: int | None


@dataclass(frozen=True)
class RunSummary:
    """A single training run: a finetune job, a candidate of a sweep, a member of a comparison."""

    name: str
    """Unique in the report."""
    label: str
    """Short, for pictures."""
    folder: str
    """The run directory, relative to the report's."""
    method: Method = "unknown"
    status: Status = "unfinished"
    reason: str = ""
    """Why it was stopped or failed."""
    group: str = ""
    """The sweep or comparison it belongs to."""
    model: str | None = None
    device: str | None = None
    rank: int | None = None
    alpha: float | None = None
    learning_rate: float | None = None
    seed: int | None = None
    steps: int | None = None
    """Optimizer steps taken."""
    total_steps: int | None = None
    """Optimizer steps configured."""
    eval_loss: float | None = None
    """The newest validation loss."""
    best_eval_loss: float | None = None
    best_step: int | None = None
    start_eval_loss: float | None = None
    saved_step: int | None = None
    """The step whose weights were saved; None for an unfinished run, and in files of older
    versions, which saved the last."""
    saved_eval_loss: float | None = None
    stopped_early: bool = False
    step_s: float | None = None
    """Median time of a step."""
    train_s: float | None = None
    """Evaluations and saves left out."""
    tokens_per_s: float | None = None
    """Target tokens per second; evaluations and saves left out."""
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    stored_bytes: int | None = None
    """Of the saved tensors: the adapter's, or all weights."""
    held_out: tuple[Point, ...] = ()
    training: tuple[Point, ...] = field(default=(), repr=False)
    course: tuple[StepState, ...] = field(default=(), repr=False)
    memory: Memory | None = None
    samples: tuple[Sample, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """By dotted name."""
    data: dict[str, Any] = field(default_factory=dict)
    """Of the training and validation data, by dotted name."""
    environment: dict[str, Any] = field(default_factory=dict)
    base_fingerprint: str | None = None
    stored_base: str = NOT_QUANTISED
    """How the frozen weights were stored, in words."""
    notes: tuple[str, ...] = ()
    command: str | None = None
    """The command line that repeats it; None if there is none."""
    saved: str | None = None
    """Directory of the adapter or model, as the report was given the run's directory."""
    next_commands: tuple[str, ...] = ()
    """Commands that use what was saved."""

    @property
    def result_loss(self) -> float | None:
        """Validation loss of the weights that were saved, else the newest."""
        return self.eval_loss if self.saved_eval_loss is None else self.saved_eval_loss

    @property
    def figures(self) -> RunFigures:
        """What the ratios to other runs are computed from."""
        return RunFigures(
            name=self.name,
            step_s=self.step_s,
            train_s=self.train_s,
            peak_memory_bytes=self.peak_memory_bytes,
            trainable_parameters=self.trainable_parameters,
            stored_bytes=self.stored_bytes,
            eval_loss=self.result_loss,
        )

    @property
    def trainable_share(self) -> float | None:
        """Trainable parameters / all parameters."""
        if self.trainable_parameters is None or not self.total_parameters:
            return None
        return self.trainable_parameters / self.total_parameters


@dataclass(frozen=True)
class GridCell:
    """Finished candidates of one rank and learning rate, averaged over seeds."""

    rank: int
    learning_rate: float
    loss: float
    """Validation loss of what was saved: the mean over seeds, the best over other settings."""
    n_seeds: int


@dataclass(frozen=True)
class SweetSpot:
    """The smallest rank whose best loss is within noise of the best loss of all ranks."""

    rank: int
    loss: float
    best_rank: int
    best_loss: float
    noise: float
    """Nats: ranks whose losses differ by at most this count as equally good."""
    noise_from: str
    """How the noise was estimated, in words."""


@dataclass(frozen=True)
class SweepSummary:
    """A sweep; its candidates are among the report's runs, with its name as `group`."""

    name: str
    folder: str
    status: Status
    candidates: int
    """Their number."""
    at_once: int | None
    """Candidates trained together, at most."""
    halving: bool
    steps: int | None
    swept: tuple[str, ...]
    """Names of the settings that vary."""
    base_eval_loss: float | None
    best: str | None
    """The run's name."""
    train_s: float | None
    peak_memory_bytes: int | None
    tried: tuple[GridCell, ...]
    """By rank, then learning rate."""
    sweet_spot: SweetSpot | None
    command: str | None


@dataclass(frozen=True)
class Change:
    """A measure before and after training."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class MemberSummary:
    """What a comparison knows of a member beside its run."""

    run: str
    """The run's name."""
    rate_chosen: str
    """sweep, default or given."""
    rates_tried: tuple[RateTrial, ...]
    forgetting: Change | None
    """Loss on another text."""
    task: Change | None
    """A score from 0 to 1."""


@dataclass(frozen=True)
class ComparisonSummary:
    """A comparison: its members are among the report's runs, under its name as group."""

    name: str
    folder: str
    status: Status
    base: str | None
    same: str | None
    """steps or time."""
    base_eval_loss: float | None = None
    rate_steps: int | None = None
    members: tuple[MemberSummary, ...] = ()
    base_samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()
    command: str | None = None


@dataclass(frozen=True)
class Report:
    """All of a report."""

    title: str
    runs: tuple[RunSummary, ...]
    """A sweep's candidates are in order, the best first."""
    sweeps: tuple[SweepSummary, ...] = ()
    comparisons: tuple[ComparisonSummary, ...] = ()
    ratios: tuple[Ratios, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader should know before comparing runs."""
    command: str = ""
    """The command line that makes this report."""

    def run(self, name: str) -> RunSummary:
        """Return the run of this name."""
        return next(run for run in self.runs if run.name == name)

    def group(self, name: str) -> list[RunSummary]:
        """Return the runs of a sweep or comparison."""
        return [run for run in self.runs if run.group == name]

    def to_dict(self) -> dict[str, Any]:
        """Return all but what metrics.jsonl has of each step, as JSON values.

        What is not finite becomes None.
        """
        values = {"kind": REPORT_KIND, "schema_version": SCHEMA_VERSION, **asdict(self)}
        for run in values["runs"]:
            del run["training"], run["course"]
        plain: dict[str, Any] = _plain(values)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
