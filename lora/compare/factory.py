"""Comparison of any model: the caller's factory builds what trains, `train` does the rest.

@dataclass(frozen=True)
class MyFactory:                          # at module level, so that it can be pickled
    base_name: str = "my model"
    def described(self): return {"base": self.base_name}
    def build(self, method, train): ...   # returns a MemberSetup

compare(FactoryTarget(MyFactory()), CompareConfig(train=TrainConfig(steps=600)))
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lora.compare.results import BaseResult, MemberResult, ModelEvaluation
from lora.compare.target import MemberTask, run_rate_trials
from lora.config import RunConfig, TrainConfig
from lora.device import DeviceChoice
from lora.distributed.ranks import is_one_of_several, world_size
from lora.errors import ConfigError
from lora.lora_module import count_lora_parameters
from lora.runs.comparison_record import RateTrial, Sample
from lora.runs.directory import create_run
from lora.runs.progress import Progress
from lora.runs.read_record import measured_peak, stored_bytes
from lora.runs.record import DataRecord, Method, RunRecord, RunResult
from lora.training.job import Stream, TrainingJob
from lora.training.plain_step import PlainStepRunner, evaluate
from lora.training.step_runner import LossFn, StepRunner
from lora.training.trainer import train as run_training


@dataclass(frozen=True)
class MemberSetup:
    """One member, ready to train."""

    model: nn.Module
    """On the device; trainable parameters have `requires_grad`."""
    loss_fn: LossFn
    stream: Stream
    """Yields micro-batches: the same ones for every method with the same seed."""
    eval_batches: Callable[[], Iterable[Any]]
    choice: DeviceChoice
    save: Callable[[Path], None]
    """Write the trained weights into a directory that does not exist yet."""
    forgetting: tuple[str, Callable[[], Iterable[Any]]] | None = None
    """Another text, not trained on: its name, and a function that returns its batches."""
    answer: Callable[[], list[Sample]] = list
    """Generates answers to the same prompts each time."""
    metric: tuple[str, Callable[[], float]] | None = None
    """A score of the model, 0 to 1: its name, and a function that computes it."""
    weight_decay: float | None = None
    """Of this method; None takes the comparison's."""
    choose_steps: Callable[[TrainConfig], StepRunner | None] = lambda config: None
    """Returns the step runner of `model` for these settings; None: the plain `train_step`."""


class Factory(Protocol):
    """Builds members, each in its own subprocess."""

    @property
    def base_name(self) -> str:
        """Name of the base model."""

    def described(self) -> dict[str, Any]:
        """Return the settings that must be equal for a comparison to be resumed."""

    def build(self, method: Method, train: TrainConfig) -> MemberSetup:
        """Return the member of this method, built from the same base each time."""


@dataclass(frozen=True)
class FactoryTarget:
    """Models that `factory` builds, as a `ComparisonTarget`."""

    factory: Factory

    def described(self) -> dict[str, Any]:
        """Return the settings that must be equal for a comparison to be resumed."""
        return self.factory.described()

    def data_record(self) -> DataRecord:
        """Return an empty record: only the factory knows its data."""
        return DataRecord()

    def check(self, methods: tuple[Method, ...], train: TrainConfig) -> None:
        """Raise ConfigError for PEFT, whose member a factory cannot build, and several processes.

        What a factory builds trains in one.
        """
        if is_one_of_several():
            raise ConfigError(
                f"Cannot compare models of a factory in {world_size()} processes: each would train "
                "on all of its batches. Run it without torchrun."
            )
        if "peft" in methods:
            raise ConfigError(
                "Cannot compare with PEFT models that a factory builds: the PEFT member needs a "
                "pretrained model. Leave 'peft' out of methods, or use lora compare --peft."
            )

    def measure_base(self, train: TrainConfig, run: RunConfig, progress: Progress) -> BaseResult:
        """Evaluate the base model."""
        setup = self.factory.build("full", train)
        loss = _loss(setup, setup.eval_batches())
        return BaseResult(self.factory.base_name, setup.choice.reason, loss, _evaluate(setup))

    def with_base(self, base: BaseResult) -> FactoryTarget:
        """Return the target itself: the factory builds the base and the members."""
        return self

    def run_member(self, task: MemberTask, progress: Progress) -> MemberResult:
        """Train a member in `task.folder` and evaluate it."""
        setup = self.factory.build(task.method, task.train)
        decay = task.train.weight_decay if setup.weight_decay is None else setup.weight_decay
        config = replace(task.train, weight_decay=decay)
        record = RunRecord(
            kind="member",
            method=task.method,
            base=self.factory.base_name,
            device=setup.choice.reason,
            learning_rate=task.train.peak_learning_rate,
            train=asdict(config),
        )
        torch.manual_seed(config.seed)
        with create_run(task.run.out, task.name, resume=task.resume, record=record) as run:
            result = run_training(
                TrainingJob(
                    model=setup.model,
                    steps=setup.choose_steps(config)
                    or PlainStepRunner(setup.model, setup.loss_fn, setup.choice, config),
                    stream=setup.stream,
                    eval_batches=setup.eval_batches,
                    train_config=config,
                    run_config=task.run,
                    run=run,
                    choice=setup.choice,
                    progress=progress,
                    resume=task.resume,
                )
            )
            run.write_result(RunResult(**vars(result)))
            saved = run.folder / ("model" if task.method == "full" else "adapter")
            shutil.rmtree(saved, ignore_errors=True)
            setup.save(saved)
            counts = count_lora_parameters(setup.model)
            return MemberResult(
                steps=result.steps,
                train_s=result.train_s,
                peak_memory_bytes=measured_peak(run.folder, result.peak_memory_bytes),
                planned_memory_bytes=None,
                trainable_parameters=counts.trainable,
                total_parameters=counts.total,
                stored_bytes=stored_bytes(saved),
                final_eval_loss=result.eval_loss,
                best_eval_loss=result.best_eval_loss,
                after=_evaluate(setup) if task.evaluate else ModelEvaluation(),
                saved_step=result.saved_step,
                saved_eval_loss=result.saved_eval_loss,
            )

    def try_rates(
        self, task: MemberTask, rates: tuple[float, ...], progress: Progress
    ) -> list[RateTrial]:
        """Train at one learning rate after the other."""
        return run_rate_trials(self.run_member, task, rates, progress)


def _evaluate(setup: MemberSetup) -> ModelEvaluation:
    text = loss = None
    if setup.forgetting is not None:
        text, batches = setup.forgetting
        loss = _loss(setup, batches())
    name = score = None
    if setup.metric is not None:
        name, measure = setup.metric
        score = measure()
    return ModelEvaluation(text, loss, name, score, tuple(setup.answer()))


def _loss(setup: MemberSetup, batches: Iterable[Any]) -> float:
    return evaluate(setup.model, batches, setup.loss_fn, setup.choice.autocast)
