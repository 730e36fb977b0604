"""Members of any model: a factory of the caller's builds what trains, `train` does the rest.

@dataclass(frozen=True)
class MyFactory:                          # of a module, so that it can be pickled
    base_name: str = "my model"
    def described(self): return {"base": self.base_name}
    def build(self, method, train): ...   # a Subject

compare(FactoryContest(MyFactory()), CompareConfig(train=TrainConfig(steps=600)))
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lora.compare.contest import Base, try_one_by_one
from lora.compare.record import Measured, Method, Sample, Trained, Tried, measured_peak
from lora.config import RunConfig, TrainConfig
from lora.device import DeviceChoice
from lora.errors import ConfigError
from lora.lora_module import count_lora_parameters
from lora.runs.folder import create_run
from lora.runs.progress import Progress
from lora.training.job import Stream, TrainingJob
from lora.training.plain_step import LossFn, evaluate
from lora.training.steps import Steps
from lora.training.trainer import train as run_training


@dataclass(frozen=True)
class Subject:
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
    choose_steps: Callable[[TrainConfig], Steps | None] = lambda config: None
    """What takes the steps of `model` with these settings; None: `train_step`."""


class Factory(Protocol):
    """Builds members, each in a process of its own."""

    @property
    def base_name(self) -> str:
        """What the base is called."""

    def described(self) -> dict[str, Any]:
        """Return what must be the same again for a comparison to be resumed."""

    def build(self, method: Method, train: TrainConfig) -> Subject:
        """Return the member of this method, from the same base each time."""


@dataclass(frozen=True)
class FactoryContest:
    """A contest of what `factory` builds."""

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

    def measure_base(self, train: TrainConfig, run: RunConfig, progress: Progress) -> Base:
        """Measure the base."""
        subject = self.factory.build("full", train)
        loss = _loss(subject, subject.eval_batches())
        return Base(self.factory.base_name, subject.choice.reason, loss, _measure(subject))

    def run_member(
        self,
        method: Method,
        train: TrainConfig,
        run: RunConfig,
        resume: bool,
        measures: bool,
        progress: Progress,
    ) -> Trained:
        """Train a member in the folder `run.out`/`run.name`, and measure it."""
        subject = self.factory.build(method, train)
        assert train.learning_rate is not None
        assert run.name is not None
        decay = train.weight_decay if subject.weight_decay is None else subject.weight_decay
        config = replace(train, weight_decay=decay)
        described: dict[str, Any] = {"method": method, "train": vars(config)}
        described["learning_rate"] = train.learning_rate
        described |= {"device": subject.choice.reason, "base": self.factory.base_name}
        torch.manual_seed(train.seed)
        with create_run(run.out, run.name, resume=resume, described=described) as folder:
            result = run_training(
                TrainingJob(
                    model=subject.model,
                    loss_fn=subject.loss_fn,
                    stream=subject.stream,
                    eval_batches=subject.eval_batches,
                    train_config=config,
                    learning_rate=train.learning_rate,
                    run_config=run,
                    run=folder,
                    choice=subject.choice,
                    progress=progress,
                    resume=resume,
                    steps=subject.choose_steps(config),
                )
            )
            folder.write_json("result.json", vars(result))
            saved = folder.folder / ("model" if method == "full" else "adapter")
            shutil.rmtree(saved, ignore_errors=True)
            subject.save(saved)
            counts = count_lora_parameters(subject.model)
            return Trained(
                steps=result.steps,
                train_s=result.train_s,
                peak_memory_bytes=measured_peak(folder.folder, result.peak_memory_bytes),
                planned_memory_bytes=None,
                trainable_parameters=counts.trainable,
                total_parameters=counts.total,
                stored_bytes=stored_bytes(saved),
                final_eval_loss=result.eval_loss,
                best_eval_loss=result.best_eval_loss,
                after=_measure(subject) if measures else Measured(),
            )

    def try_rates(
        self,
        method: Method,
        rates: tuple[float, ...],
        train: TrainConfig,
        run: RunConfig,
        progress: Progress,
    ) -> list[Tried]:
        """Train at one rate after the other."""
        return try_one_by_one(self.run_member, method, rates, train, run, progress)


def stored_bytes(folder: Path) -> int:
    """Return the bytes of the tensors saved in `folder`."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _measure(subject: Subject) -> Measured:
    text = loss = None
    if subject.forgetting is not None:
        text, batches = subject.forgetting
        loss = _loss(subject, batches())
    name = score = None
    if subject.metric is not None:
        name, measure = subject.metric
        score = measure()
    return Measured(text, loss, name, score, tuple(subject.answer()))


def _loss(subject: Subject, batches: Iterable[Any]) -> float:
    return evaluate(subject.model, batches, subject.loss_fn, subject.choice.autocast)
