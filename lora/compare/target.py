"""The interface between a comparison and the models it compares.

`decoder_target.DecoderTarget` (pretrained models on files of examples) and `factory.FactoryTarget`
(any model that a factory builds) implement it. No torch here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lora.compare.results import BaseResult, MemberResult
from lora.compare.together import agreed
from lora.config import RunConfig, TrainConfig
from lora.distributed.ranks import world_size
from lora.errors import LostProcessError, TrainingError
from lora.runs.comparison_record import RateTrial
from lora.runs.directory import Run
from lora.runs.progress import Progress
from lora.runs.read_record import read_record_file
from lora.runs.record import DataRecord, Method
from lora.training.out_of_memory import is_out_of_memory

RATE_TRIAL_FILE = "tried.json"


@dataclass(frozen=True)
class MemberTask:
    """One member to train: method, settings, and where its run directory is."""

    method: Method
    train: TrainConfig
    """With the member's own number of steps and learning rate."""
    run: RunConfig
    """`out`/`name` is the member's run directory."""
    resume: bool = False
    """Continue from the newest checkpoint in that directory."""
    evaluate: bool = True
    """Whether the saved weights are evaluated afterwards: other text, metric, samples. False for a
    run of which only the losses or the times are wanted."""

    @property
    def name(self) -> str:
        """Name of the run directory."""
        assert self.run.name is not None  # a comparison names every member
        return self.run.name

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.run.out / self.name


@dataclass(frozen=True)
class TrainingOutcome:
    """How a member's training ended, before its saved weights are evaluated."""

    folder: Path
    saved: Path
    """The adapter's directory, or the whole model's."""
    steps: int
    train_s: float
    peak_memory_bytes: int
    planned_memory_bytes: int | None
    eval_loss: float
    best_eval_loss: float
    saved_step: int
    saved_eval_loss: float


class ComparisonTarget(Protocol):
    """Models to compare. It is pickled into the subprocess of each member."""

    def described(self) -> dict[str, Any]:
        """Return the settings that must be equal for a comparison to be resumed."""

    def data_record(self) -> DataRecord:
        """Return where the training data comes from, as run.json has it."""

    def check(self, methods: tuple[Method, ...], train: TrainConfig) -> None:
        """Raise for what no member can do, before anything is written."""

    def measure_base(self, train: TrainConfig, run: RunConfig, progress: Progress) -> BaseResult:
        """Evaluate the base model."""

    def with_base(self, base: BaseResult) -> ComparisonTarget:
        """Return the target whose members run as `base` did, which may be of an earlier call."""

    def run_member(self, task: MemberTask, progress: Progress) -> MemberResult:
        """Train a member in `task.folder` and evaluate what it saved."""

    def try_rates(
        self, task: MemberTask, rates: tuple[float, ...], progress: Progress
    ) -> list[RateTrial]:
        """Return the final validation loss at each learning rate; all runs go into `task.run.out`.

        `task` has neither a learning rate nor a name of its own.
        """


RunMember = Callable[[MemberTask, Progress], MemberResult]


def run_rate_trials(
    run_member: RunMember, task: MemberTask, rates: tuple[float, ...], progress: Progress
) -> list[RateTrial]:
    """Train at one learning rate after the other; of each run only the metrics and losses stay.

    Trials that an interrupted call has finished are read, not repeated.
    """
    found: list[RateTrial] = []
    for number, rate in enumerate(rates, start=1):
        name = f"{task.method}-{rate:g}"
        trial = MemberTask(
            method=task.method,
            train=replace(task.train, learning_rate=rate),
            run=short_run(task.run, name, task.train.n_steps),
            evaluate=False,
        )
        trial_record = agreed(partial(_finished_trial, trial), "a finished trial")
        if trial_record is None:
            progress.message(f"learning rate {number} of {len(rates)}: {rate:g}")
            tried = _run_trial(run_member, trial, progress)
            trial_record = agreed(partial(_finish_trial, trial, tried), "the end of a trial")
        found.append(trial_record)
    return found


def _finished_trial(trial: MemberTask) -> RateTrial | None:
    """Return the record of a finished trial; None where there is none, its directory removed."""
    path = trial.folder / RATE_TRIAL_FILE
    if not path.is_file():
        shutil.rmtree(trial.folder, ignore_errors=True)  # of a trial that was killed
        return None
    return read_record_file(RateTrial, path)


def _finish_trial(trial: MemberTask, tried: RateTrial) -> RateTrial:
    remove_weights(trial.folder)
    trial.folder.mkdir(parents=True, exist_ok=True)  # of one that failed before it had a run
    Run(trial.folder).write_json(RATE_TRIAL_FILE, asdict(tried))
    record = _finished_trial(trial)
    assert record is not None  # just written
    return record


def short_run(run: RunConfig, name: str, steps: int) -> RunConfig:
    """Return the settings of a run that is evaluated and saved after its last step only."""
    return replace(
        run, name=name, eval_every_steps=steps, save_every_steps=steps, keep_checkpoints=1,
        patience=0, samples=0, tensorboard=False,
    )  # fmt: skip


def _run_trial(run_member: RunMember, trial: MemberTask, progress: Progress) -> RateTrial:
    learning_rate = trial.train.peak_learning_rate
    try:
        loss: float | None = run_member(trial, progress).final_eval_loss
    except LostProcessError:
        raise
    except TrainingError as error:
        if error.__cause__ and is_out_of_memory(error.__cause__) and world_size() > 1:
            raise  # perhaps of this process alone: the others wait for it in their step
        progress.message(f"learning rate {learning_rate:g} failed: {error}")
        loss = None
    return RateTrial(learning_rate, loss)


def remove_weights(folder: Path) -> None:
    """Remove the weights that a short run saved: only its metrics are wanted."""
    for name in ("checkpoints", "adapter", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
