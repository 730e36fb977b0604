"""Real models on files of examples: what `lora compare` compares. No torch here.

Members are `lora finetune`'s own runs, so that each is what a user of it gets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lora.compare.record import MemberResult, Method, RateTrial
from lora.compare.target import BaseResult, run_rate_trials
from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.data.reading.readers import Source
from lora.errors import ConfigError, did_you_mean, gather
from lora.runs.progress import Progress

Metric = Literal["none", "exact-match", "json-fields"]


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured besides speed, memory and held-out loss."""

    forgetting_data: Source | None = None
    """Another text than the one that is learned, whose loss is measured before and after; None
    takes prose that every Python has."""
    metric: Metric = "none"
    """Score of answers: exact-match, or json-fields (those of a JSON object that are right)."""
    test_data: Source | None = None
    """Examples that are answered for the metric; None takes the held-out ones."""
    answers: int = 40
    """At most so many of them are answered."""
    answer_tokens: int = 128
    """Most tokens of such an answer."""

    def __post_init__(self) -> None:
        faults = []
        if self.metric not in get_args(Metric):
            near = did_you_mean(str(self.metric), get_args(Metric))
            faults.append(
                f"metric={self.metric!r}: allowed are {', '.join(get_args(Metric))}.{near}"
            )
        for name in ("answers", "answer_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                faults.append(f"{name}={value!r}: allowed is an int ≥ 1")
        if self.test_data is not None and self.metric == "none":
            faults.append("test_data without metric: name the metric that it is for")
        if faults:
            raise ConfigError(gather(faults, "These measures cannot be taken:", "Change them."))


@dataclass(frozen=True)
class DecoderTarget:
    """A real model, what it learns, and what is measured."""

    data: Source
    """A file or folder of examples, or a list of dicts."""
    model: str | None = None
    """A folder, a .gguf file, a hub's owner/name; None: SmolLM2-135M-Instruct."""
    eval_data: Source | None = None
    """Examples to measure on; None splits some off `data`."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    measures: EvaluationConfig = field(default_factory=EvaluationConfig)

    def described(self) -> dict[str, Any]:
        """Return what must be the same again for a comparison to be resumed."""
        sources = {"data": self.data, "eval_data": self.eval_data}
        measures = vars(self.measures)
        return {
            "model": self.model,
            "lora": asdict(self.lora),
            "data_config": {k: _named(v) for k, v in asdict(self.data_config).items()},
            **{name: _named(source) for name, source in sources.items()},
            "measures": {name: _named(value) for name, value in measures.items()},
        }

    def check(self, methods: tuple[Method, ...], train: TrainConfig) -> None:
        """Raise ConfigError or DependencyError for what PEFT's member cannot do."""
        if "peft" in methods:
            from lora.compare.peft import check_peft

            check_peft(self.lora, self.data_config)

    def measure_base(self, train: TrainConfig, run: RunConfig, progress: Progress) -> BaseResult:
        """Measure the base."""
        from lora.compare.member import measure_base

        return measure_base(self, train, run, progress)

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
        from lora.compare.member import run_member

        return run_member(self, method, train, run, resume, measures, progress)

    def try_rates(
        self,
        method: Method,
        rates: tuple[float, ...],
        train: TrainConfig,
        run: RunConfig,
        progress: Progress,
    ) -> list[RateTrial]:
        """Train LoRA's rates at once, full fine-tuning's one after the other."""
        can_stack = not (self.data_config.special_tokens or self.lora.rank_pattern)
        if method == "lora" and len(rates) > 1 and can_stack:
            from lora.compare.member import run_stacked_rate_trials

            return run_stacked_rate_trials(self, rates, train, run, progress)
        return run_rate_trials(self.run_member, method, rates, train, run, progress)


def _named(value: object) -> object:
    """Return a source or setting as run.json says it; rows in memory are told by their number."""
    if value is None or isinstance(value, str | int | float | tuple):
        return value
    if isinstance(value, Path):
        return str(value)
    return f"{len(list(cast(Iterable[Any], value)))} rows given in Python"
