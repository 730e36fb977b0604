"""Members of any model: a factory of the caller's builds what trains, `train` does the rest.

@dataclass(frozen=True)
class MyFactory:                          # of a module, so that it can be pickled
    base_name: str = "my model"
    def described(self): return {"base": self.base_name}
    def build(self, method, train): ...   # a MemberSetup

compare(FactoryTarget(MyFactory()), CompareConfig(train=TrainConfig(steps=600)))
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lora.compare.record import MemberResult, Method, ModelEvaluation, RateTrial, Sample
from lora.compare.target import BaseResult, run_rate_trials
from lora.config import RunConfig, TrainConfig
from lora.device import DeviceChoice
from lora.errors import ConfigError
from lora.lora_module import count_lora_parameters
from lora.runs.directory import create_run
from lora.runs.progress import Progress
from lora.runs.read_record import measured_peak, stored_bytes
from lora.training.job import Stream, TrainingJob
from lora.training.plain_step import LossFn, evaluate
from lora.training.step_runner import StepRunner
from lora.training.trainer import train as run_training


@dataclass(frozen=True)
class MemberSetup:
    """One member, ready to train."""

    model: nn.Module
    """On the device; what trains has `requires_grad`."""
    loss_fn: LossFn
    stream: Stream
    """A micro-batch a call; the same for every method and the same seed."""
    eval_batches: Callable[[], Iterable[Any]]
    choice: DeviceChoice
    save: Callable[[Path], None]
    """Write what was learned into a folder that does not exist yet."""
    forgetting: tuple[str, Callable[[], Iterable[Any]]] | None = None
    """Another text than the one that is learned: its name, and its batches."""
    answer: Callable[[], list[Sample]] = list
    """Let the model write, the same prompts each time."""
    metric: tuple[str, Callable[[], float]] | None = None
    """A score of the model, 0 to 1: its name, and what measures it."""
    weight_decay: float | None = None
    """Of this method; None takes the comparison's."""
    choose_steps: Callable[[TrainConfig], StepRunner | None] = lambda config: None
    """What takes the steps of `model` with these settings; None: `train_step`."""


class Factory(Protocol):
    """Builds members, each in a process of its own."""

    @property
    def base_name(self) -> str:
        """What the base is called."""

    def described(self) -> dict[str, Any]:
        """Return what must be the same again for a comparison to be resumed."""

    def build(self, method: Method, train: TrainConfig) -> MemberSetup:
        """Return the member of this method, from the same base each time."""


@dataclass(frozen=True)
class FactoryTarget:
    """Models that `factory` builds, as a comparison trains them."""

    factory: Factory

    def described(self) -> dict[str, Any]:
        """Return what must be the same again for a comparison to be resumed."""
        return self.factory.described()

    def check(self, methods: tuple[Method, ...], train: TrainConfig) -> None:
        """Raise ConfigError if PEFT is asked for, which a factory cannot build."""
        if "peft" in methods:
            raise ConfigError(
                "A comparison with PEFT was asked for models that a factory builds: PEFT takes "
                "part with real models only. Leave it out, or use lora compare --peft."
            )

    def measure_base(self, train: TrainConfig, run: RunConfig, progress: Progress) -> BaseResult:
        """Measure the base."""
        setup = self.factory.build("full", train)
        loss = _loss(setup, setup.eval_batches())
        return BaseResult(self.factory.base_name, setup.choice.reason, loss, _measure(setup))

    def run_member(
        self,
        method: Method,
        train: TrainConfig,
        run: RunConfig,
        resume: bool,
        measures: bool,
        progress: Progress,
    ) -> MemberResult:
        """Train a member in the folder `run.out`/`run.name`, and measure it."""
        setup = self.factory.build(method, train)
        assert train.learning_rate is not None
        assert run.name is not None
        decay = train.weight_decay if setup.weight_decay is None else setup.weight_decay
        config = replace(train, weight_decay=decay)
        described: dict[str, Any] = {"method": method, "train": vars(config)}
        described["learning_rate"] = train.learning_rate
        described |= {"device": setup.choice.reason, "base": self.factory.base_name}
        torch.manual_seed(train.seed)
        with create_run(run.out, run.name, resume=resume, described=described) as folder:
            result = run_training(
                TrainingJob(
                    model=setup.model,
                    loss_fn=setup.loss_fn,
                    stream=setup.stream,
                    eval_batches=setup.eval_batches,
                    train_config=config,
                    learning_rate=train.learning_rate,
                    run_config=run,
                    run=folder,
                    choice=setup.choice,
                    progress=progress,
                    resume=resume,
                    steps=setup.choose_steps(config),
                )
            )
            folder.write_json("result.json", vars(result))
            saved = folder.folder / ("model" if method == "full" else "adapter")
            shutil.rmtree(saved, ignore_errors=True)
            setup.save(saved)
            counts = count_lora_parameters(setup.model)
            return MemberResult(
                steps=result.steps,
                train_s=result.train_s,
                peak_memory_bytes=measured_peak(folder.folder, result.peak_memory_bytes),
                planned_memory_bytes=None,
                trainable_parameters=counts.trainable,
                total_parameters=counts.total,
                stored_bytes=stored_bytes(saved),
                final_eval_loss=result.eval_loss,
                best_eval_loss=result.best_eval_loss,
                after=_measure(setup) if measures else ModelEvaluation(),
            )

    def try_rates(
        self,
        method: Method,
        rates: tuple[float, ...],
        train: TrainConfig,
        run: RunConfig,
        progress: Progress,
    ) -> list[RateTrial]:
        """Train at one rate after the other."""
        return run_rate_trials(self.run_member, method, rates, train, run, progress)


def _measure(setup: MemberSetup) -> ModelEvaluation:
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
