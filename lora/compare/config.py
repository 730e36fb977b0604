"""Settings of a comparison: its methods, their learning rates, how long they train. No torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

from lora.config import (
    COMPARED,
    FULL_LEARNING_RATE,
    LORA_LEARNING_RATE,
    RunConfig,
    TrainConfig,
)
from lora.errors import CheckpointError, ConfigError, did_you_mean, gather
from lora.public.field_texts import documented
from lora.runs.comparison_record import Same
from lora.runs.read_record import describe_changes, read_run_record, recorded_steps
from lora.runs.record import RUN_FILE, Method
from lora.settings.base import Settings

ANSWERS = ("save", "samples", "sample_tokens")
"""What decides on the weights and answers that members have: a resume cannot change it."""
MIN_RATE_STEPS = 20
"""Of a trial of a learning rate, unless the comparison itself has fewer."""


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of the methods: to try, given, or the defaults."""

    rates: tuple[float | str, ...] = field(default=(), metadata=COMPARED)
    """Learning rates of LoRA to try in short runs, the best is used: 3e-4,1e-3,3e-3."""
    full_rates: tuple[float | str, ...] = field(default=(), metadata=COMPARED)
    """Learning rates of full fine-tuning to try. Default: a tenth of each of `rates`."""
    full_learning_rate: float | None = field(default=None, metadata=COMPARED)
    """Peak learning rate of full fine-tuning, instead of trials. Default: 1e-4."""
    rate_steps: int = field(default=0, metadata=COMPARED)
    """Optimizer steps of each trial; 0 means a quarter of the run's steps, at least 20."""

    def __post_init__(self) -> None:
        faults: list[str] = []
        for name in ("rates", "full_rates"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), faults))
        rate = self.full_learning_rate
        if rate is not None and not (_is_number(rate) and rate > 0):
            faults.append(f"full_learning_rate={rate!r}. Allowed: a number > 0")
        if self.full_rates and not self.rates:
            faults.append("full_rates without rates: both methods get trials, or neither does")
        if self.rates and rate is not None:
            faults.append("full_learning_rate together with rates: give one or the other")
        if not isinstance(self.rate_steps, int) or self.rate_steps < 0:
            faults.append(f"rate_steps={self.rate_steps!r}. Allowed: an int ≥ 0")
        if self.rate_steps and not self.rates:
            faults.append("rate_steps without rates: they are the steps of each trial, name rates")
        if faults:
            advice = "Separate several values by commas, as in --rates 3e-4,1e-3."
            raise ConfigError(gather(faults, "Cannot use these learning rates:", advice))

    def to_try(self, method: Method) -> tuple[float, ...]:
        """Return the learning rates to try for `method`; () if one is given, or for the default."""
        rates = cast(tuple[float, ...], self.rates)
        if method != "full":
            return rates
        given = cast(tuple[float, ...], self.full_rates)
        return given or tuple(_round(rate / 10) for rate in rates)


@documented
@dataclass(frozen=True)
class CompareConfig(Settings):
    """What all members share, and how the comparison is run."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """Of all members; `learning_rate` is LoRA's, None if it is to be tried or the default."""
    run: RunConfig = field(default_factory=RunConfig)
    rates: LearningRates = field(default_factory=LearningRates)
    methods: tuple[Method, ...] = ("lora", "full")
    """In this order; the first is lora, whose training time the others get with same="time"."""
    same: Same = "steps"
    """What the members share: the number of steps, or the time in steps (LoRA's)."""
    resume: bool = False
    """Resume the comparison of this name."""
    isolated: bool = True
    """Train each member in a subprocess, so that its peak memory is its own. False trains all of
    them in this process: faster to start, but on a CPU a peak includes the members before."""
    default_rates: tuple[float, float] = (LORA_LEARNING_RATE, FULL_LEARNING_RATE)
    """Learning rates of LoRA and of full fine-tuning where none is given or tried."""

    def __post_init__(self) -> None:
        faults = []
        if self.same not in get_args(Same):
            faults.append(
                f"same={self.same!r}. Allowed: steps, time."
                f"{did_you_mean(str(self.same), get_args(Same))}"
            )
        known = get_args(Method)
        unknown = [m for m in self.methods if m not in known]
        if unknown or len(set(self.methods)) != len(self.methods):
            faults.append(f"methods={self.methods!r}. Allowed: {', '.join(known)}, each once")
        if self.methods[:1] != ("lora",) or len(self.methods) < 2:
            faults.append(f"methods={self.methods!r}. Allowed: lora first, then at least one other")
        if self.rates.rates and self.train.learning_rate is not None:
            faults.append("learning_rate together with rates: give one or the other")
        if self.train.steps is not None and self.rates.rate_steps > self.train.steps:
            faults.append(
                f"rate_steps={self.rates.rate_steps}. Allowed: at most the {self.train.steps} "
                "steps of the comparison"
            )
        if self.resume and self.run.name is None:
            faults.append("resume without a name: name the comparison to resume")
        if faults:
            raise ConfigError(gather(faults, "Cannot compare with these settings:", "Change them."))

    @property
    def steps_tried(self) -> int:
        """Steps of each trial of a learning rate."""
        steps = self.train.n_steps
        quarter = max(MIN_RATE_STEPS, math.ceil(steps / 4))
        return self.rates.rate_steps or min(steps, quarter)

    def described(self) -> dict[str, Any]:
        """Return the settings that must be equal for this comparison to be resumed."""
        return {
            "methods": list(self.methods),
            "same": self.same,
            "rates": {**asdict(self.rates), "rate_steps": self.steps_tried},
            # Steps stand for epochs, and a record of an older version has no such key.
            "train": {k: v for k, v in asdict(self.train).items() if k != "epochs"},
        }


def with_recorded_steps(config: CompareConfig) -> CompareConfig:
    """Return the settings of a resumed comparison that gives neither steps nor epochs with those of
    its record."""
    train = config.train
    if not config.resume or train.steps is not None or train.epochs is not None:
        return config
    steps = recorded_steps(config.run.out / str(config.run.name))
    return config if steps is None else replace(config, train=replace(train, steps=steps))


def check_same_comparison(config: CompareConfig, described: dict[str, Any]) -> None:
    """Raise CheckpointError if the run to be resumed is not a comparison with these settings."""
    directory = config.run.out / str(config.run.name)
    if not config.resume or not (directory / RUN_FILE).is_file():
        return
    record = read_run_record(directory)
    former = record.compare
    if former is None:
        raise CheckpointError(
            f"Cannot resume {directory} as a comparison: it is another kind of run. Name a "
            "comparison, or use lora finetune --resume."
        )
    then, now = _leaves(former), _leaves(described)
    faults = [
        f"{key}: {then.get(key, 'not set')} then, {now.get(key, 'not set')} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    faults += describe_changes(record.run, vars(config.run), ANSWERS)
    if faults:
        heading = f"Cannot resume the comparison {directory} with other settings:"
        advice = "Resume with the settings it started with, or start a new comparison."
        raise CheckpointError(gather(faults, heading, advice))


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted name, as they come back from JSON."""
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= _leaves(inner, f"{prefix}.{key}" if prefix else key)
        return found
    if isinstance(value, Path):
        value = str(value)
    return {prefix: list(value) if isinstance(value, tuple) else value}


def _numbers(name: str, value: object, faults: list[str]) -> tuple[float, ...]:
    """Return the numbers in `value`, in which commas separate too; add what is none to `faults`."""
    items = value if isinstance(value, list | tuple) else (value,)
    words = [w for item in items for w in (item.split(",") if isinstance(item, str) else [item])]
    numbers: list[float] = []
    for word in words:
        try:
            number = float(word)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(word, bool) or not (math.isfinite(number) and number > 0):
            faults.append(f"{name}={word!r}. Allowed: numbers > 0")
        numbers.append(number)
    if len(set(numbers)) != len(numbers):
        faults.append(f"{name}: a learning rate is given twice")
    return tuple(numbers)


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


def _round(value: float) -> float:
    return float(f"{value:.6g}")
