"""What a comparison needs of the models it compares: the base measured, a member trained.

Two exist: `decoder_target.DecoderTarget` for real models and files of examples, and
`factory.FactoryTarget` for any model that a factory builds. No torch here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lora.compare.record import (
    MemberResult,
    Method,
    ModelEvaluation,
    RateTrial,
    model_evaluation_from,
)
from lora.config import RunConfig, TrainConfig
from lora.errors import TrainingError
from lora.runs.directory import Run
from lora.runs.disk import read_json, reading
from lora.runs.progress import Progress

RATE_TRIAL_FILE = "tried.json"


@dataclass(frozen=True)
class BaseResult:
    """The base as it is before any training."""

    name: str
    device: str
    """Where it computes, and why."""
    eval_loss: float
    """Held-out loss, nats."""
    measured: ModelEvaluation


@dataclass(frozen=True)
class TrainingOutcome:
    """How a member's training ended, before what it saved is measured."""

    folder: Path
    saved: Path
    """The adapter's folder, or the whole model's."""
    steps: int
    train_s: float
    peak_memory_bytes: int
    planned_memory_bytes: int | None
    eval_loss: float
    best_eval_loss: float


class ComparisonTarget(Protocol):
    """Models to compare; it is pickled into the process of each member."""

    def described(self) -> dict[str, Any]:
        """Return what must be the same again for a comparison to be resumed."""

    def check(self, methods: tuple[Method, ...], train: TrainConfig) -> None:
        """Raise for what no member can do, before anything is written."""

    def measure_base(self, train: TrainConfig, run: RunConfig, progress: Progress) -> BaseResult:
        """Measure the base."""

    def run_member(
        self,
        method: Method,
        train: TrainConfig,
        run: RunConfig,
        resume: bool,
        measures: bool,
        progress: Progress,
    ) -> MemberResult:
        """Train a member in the folder `run.out`/`run.name`, and measure what was saved."""

    def try_rates(
        self,
        method: Method,
        rates: tuple[float, ...],
        train: TrainConfig,
        run: RunConfig,
        progress: Progress,
    ) -> list[RateTrial]:
        """Return the held-out loss at the end of a training at each rate, the folder `run.out`."""


RunMember = Callable[[Method, TrainConfig, RunConfig, bool, bool, Progress], MemberResult]


def run_rate_trials(
    run_member: RunMember,
    method: Method,
    rates: tuple[float, ...],
    train: TrainConfig,
    run: RunConfig,
    progress: Progress,
) -> list[RateTrial]:
    """Train at one rate after the other; of each its metrics are kept, and its loss.

    Those that an interrupted call has finished are not repeated.
    """
    found = []
    for number, rate in enumerate(rates, start=1):
        name = f"{method}-{rate:g}"
        folder = run.out / name
        if not (folder / RATE_TRIAL_FILE).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of a try that was killed
            progress.message(f"rate {number} of {len(rates)}: {rate:g}")
            config, own = replace(train, learning_rate=rate), short_run(run, name, train.steps)
            tried = _try(run_member, method, config, own, progress)
            Run(folder).write_json(RATE_TRIAL_FILE, asdict(tried))
        with reading(folder / RATE_TRIAL_FILE):
            found.append(RateTrial(**read_json(folder / RATE_TRIAL_FILE)))
    return found


def short_run(run: RunConfig, name: str, steps: int) -> RunConfig:
    """Return the settings of a run that is measured at its end only."""
    return replace(
        run, name=name, eval_every_steps=steps, save_every_steps=steps, keep_checkpoints=1,
        patience=0, samples=0, tensorboard=False,
    )  # fmt: skip


def _try(
    run_member: RunMember, method: Method, train: TrainConfig, run: RunConfig, progress: Progress
) -> RateTrial:
    rate = train.learning_rate
    assert rate is not None
    folder = run.out / str(run.name)
    try:
        loss: float | None = run_member(method, train, run, False, False, progress).final_eval_loss
    except TrainingError as error:
        progress.message(f"rate {rate:g} failed: {error}")
        loss = None
    finally:
        remove_weights(folder)
    return RateTrial(rate, loss)


def remove_weights(folder: Path) -> None:
    """Remove what a short run saved: only its losses are wanted."""
    for name in ("checkpoints", "adapter", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)


def base_result_from(values: dict[str, Any]) -> BaseResult:
    """Return a base from its JSON values."""
    return BaseResult(**{**values, "measured": model_evaluation_from(values["measured"])})


def member_result_from(values: dict[str, Any]) -> MemberResult:
    """Return what a training came to from its JSON values."""
    return MemberResult(**{**values, "after": model_evaluation_from(values["after"])})
