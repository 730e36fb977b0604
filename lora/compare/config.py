"""What a comparison is asked to do: which members, at which rates, for how long. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from lora.config import FULL_LEARNING_RATE, LORA_LEARNING_RATE, RunConfig, TrainConfig
from lora.errors import CheckpointError, ConfigError, did_you_mean, gather
from lora.runs.comparison_record import Same
from lora.runs.disk import read_json
from lora.runs.record import Method

MIN_RATE_STEPS = 20
"""Steps of a try, unless the comparison itself has fewer."""


@dataclass(frozen=True)
class LearningRates:
    """Learning rates: those to try, one that is given, or the defaults."""

    rates: tuple[float | str, ...] = ()
    """Learning rates of LoRA to try in short runs, the best is used: 3e-4,1e-3,3e-3."""
    full_rates: tuple[float | str, ...] = ()
    """Learning rates of full fine-tuning to try. Default: a tenth of each of `rates`."""
    full_learning_rate: float | None = None
    """Peak learning rate of full fine-tuning, without tries. Default: 1e-4."""
    rate_steps: int = 0
    """Optimizer steps of each try; 0 means a quarter of the run's steps, at least 20."""

    def __post_init__(self) -> None:
        faults: list[str] = []
        for name in ("rates", "full_rates"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), faults))
        rate = self.full_learning_rate
        if rate is not None and not (_is_number(rate) and rate > 0):
            faults.append(f"full_learning_rate={rate!r}: allowed is a number > 0")
        if self.full_rates and not self.rates:
            faults.append("full_rates without rates: each method gets tries, or none does")
        if self.rates and rate is not None:
            faults.append("full_learning_rate beside rates: give one or the other")
        if not isinstance(self.rate_steps, int) or self.rate_steps < 0:
            faults.append(f"rate_steps={self.rate_steps!r}: allowed is an int ≥ 0")
        if faults:
            advice = "Write values with commas between, as in --rates 3e-4,1e-3."
            raise ConfigError(gather(faults, "The learning rates cannot be used:", advice))

    def to_try(self, method: Method) -> tuple[float, ...]:
        """Return the rates to try for `method`; () if it has one that is given or its default."""
        rates = cast(tuple[float, ...], self.rates)
        if method != "full":
            return rates
        given = cast(tuple[float, ...], self.full_rates)
        return given or tuple(_round(rate / 10) for rate in rates)


@dataclass(frozen=True)
class CompareConfig:
    """What all members share, and what the comparison does."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """Of all members; `learning_rate` is LoRA's, if it is given and not tried."""
    run: RunConfig = field(default_factory=RunConfig)
    rates: LearningRates = field(default_factory=LearningRates)
    methods: tuple[Method, ...] = ("lora", "full")
    """In this order; the first is LoRA, whose steps or time the others get."""
    same: Same = "steps"
    """What the members share: steps, or time (LoRA's, in steps alone)."""
    resume: bool = False
    """Go on with the comparison of this name."""
    isolated: bool = True
    """A process of its own for each member, so that each has its own peak of memory. False runs
    all of them in this process: quicker to start, and on a CPU the peaks are not their own."""
    default_rates: tuple[float, float] = (LORA_LEARNING_RATE, FULL_LEARNING_RATE)
    """Of LoRA and of full fine-tuning, where none is given or tried."""

    def __post_init__(self) -> None:
        faults = []
        if self.same not in get_args(Same):
            faults.append(
                f"same={self.same!r}: allowed are steps, time."
                f"{did_you_mean(str(self.same), get_args(Same))}"
            )
        known = get_args(Method)
        strange = [m for m in self.methods if m not in known]
        if strange or len(set(self.methods)) != len(self.methods):
            faults.append(f"methods={self.methods!r}: allowed are {', '.join(known)}, each once")
        if self.methods[:1] != ("lora",) or len(self.methods) < 2:
            faults.append(f"methods={self.methods!r}: lora is the first of at least two")
        if self.rates.rates and self.train.learning_rate is not None:
            faults.append("learning_rate beside rates: give one or the other")
        if self.rates.rate_steps > self.train.steps:
            faults.append(
                f"rate_steps={self.rates.rate_steps}: allowed are at most the "
                f"{self.train.steps} steps of the comparison"
            )
        if self.resume and self.run.name is None:
            faults.append("resume without a name: name the comparison to go on with")
        if faults:
            raise ConfigError(gather(faults, "No comparison can do this:", "Change it."))

    @property
    def steps_tried(self) -> int:
        """Steps of each try of a rate."""
        quarter = max(MIN_RATE_STEPS, math.ceil(self.train.steps / 4))
        return self.rates.rate_steps or min(self.train.steps, quarter)

    def described(self) -> dict[str, Any]:
        """Return what must be the same again for this comparison to be resumed."""
        return {
            "methods": list(self.methods),
            "same": self.same,
            "rates": {**asdict(self.rates), "rate_steps": self.steps_tried},
            "train": asdict(self.train),
        }


def check_same_comparison(config: CompareConfig, described: dict[str, Any]) -> None:
    """Raise CheckpointError if another comparison is to be resumed as this one."""
    path = config.run.out / str(config.run.name) / "run.json"
    if not config.resume or not path.is_file():
        return
    whole = read_json(path)
    former = whole.get("compare") if isinstance(whole, dict) else None
    if former is None:
        raise CheckpointError(
            f"The run {path.parent} was to be resumed as a comparison, and it is none. Give the "
            "name of a comparison, or use lora finetune --resume."
        )
    then, now = _flat(former), _flat(described)
    faults = [
        f"{key}: {then.get(key, 'not given')} then, {now.get(key, 'not given')} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if faults:
        heading = f"The comparison {path.parent} cannot be resumed as another one:"
        advice = "Resume with the values that it began with, or begin a new comparison."
        raise CheckpointError(gather(faults, heading, advice))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted name, as JSON would give them back."""
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= _flat(inner, f"{prefix}.{key}" if prefix else key)
        return found
    if isinstance(value, Path):
        value = str(value)
    return {prefix: list(value) if isinstance(value, tuple) else value}


def _numbers(name: str, value: object, faults: list[str]) -> tuple[float, ...]:
    """Return the numbers in `value`, parted at commas too; what cannot be is a fault."""
    items = value if isinstance(value, list | tuple) else (value,)
    words = [w for item in items for w in (item.split(",") if isinstance(item, str) else [item])]
    numbers: list[float] = []
    for word in words:
        try:
            number = float(word)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(word, bool) or not (math.isfinite(number) and number > 0):
            faults.append(f"{name}={word!r}: allowed are numbers > 0")
        numbers.append(number)
    if len(set(numbers)) != len(numbers):
        faults.append(f"{name}: a rate was given twice")
    return tuple(numbers)


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


def _round(value: float) -> float:
    return float(f"{value:.6g}")
