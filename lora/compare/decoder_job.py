"""Pretrained models in a comparison: the model, the training data, and what is evaluated.

No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from lora.compare.target import MemberTask
from lora.config import EVALUATION, LoRAConfig
from lora.data.reading.readers import Source
from lora.data.task import LoRATask
from lora.errors import ConfigError, did_you_mean, gather
from lora.runs.record import IN_MEMORY, DataRecord

if TYPE_CHECKING:
    from lora.finetune.job import FinetuneJob

Metric = Literal["none", "exact-match", "json-fields"]


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated besides speed, memory and validation loss."""

    forgetting_data: Source | None = field(default=None, metadata=EVALUATION)
    """Unrelated text to measure forgetting on. Default: prose from Python's documentation.

    Its loss is measured before and after training."""
    metric: Metric = field(default="none", metadata=EVALUATION)
    """Score of generated answers: exact-match, or json-fields (fraction of JSON fields right)."""
    test_data: Source | None = field(default=None, metadata=EVALUATION)
    """Test examples whose answers are scored by `metric`. Default: the validation examples."""
    answers: int = field(default=40, metadata=EVALUATION)
    """Maximum number of examples that are answered for the metric."""
    answer_tokens: int = field(default=128, metadata=EVALUATION)
    """Maximum number of tokens of such an answer."""

    def __post_init__(self) -> None:
        faults = []
        if self.metric not in get_args(Metric):
            near = did_you_mean(str(self.metric), get_args(Metric))
            faults.append(f"metric={self.metric!r}. Allowed: {', '.join(get_args(Metric))}.{near}")
        for name in ("answers", "answer_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                faults.append(f"{name}={value!r}. Allowed: an int ≥ 1")
        for name in ("test_data", "answers", "answer_tokens"):
            if self.metric == "none" and getattr(self, name) != getattr(EvaluationConfig, name):
                faults.append(f"{name} without metric: name the metric that it is for")
        if faults:
            heading = "Cannot evaluate the members with these settings:"
            raise ConfigError(gather(faults, heading, "Change them."))


@dataclass(frozen=True, kw_only=True)
class DecoderJob(LoRATask):
    """A pretrained model, the data to train on, LoRA's settings, and what is evaluated."""

    lora: LoRAConfig = field(default_factory=LoRAConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def described(self) -> dict[str, Any]:
        """Return the settings that must be equal for a comparison to be resumed."""
        sources = {"data": self.data, "eval_data": self.eval_data}
        return {
            "model": self.model,
            **({} if self.implementation == "auto" else {"implementation": self.implementation}),
            **({"base": self.base_settings} if self.base_weights.is_quantised else {}),
            "lora": asdict(self.lora),
            "data_config": {
                **{k: _json_value(v) for k, v in asdict(self.data_config).items()},
                "packing": self.data_config.is_packed,
            },
            **{name: _json_value(source) for name, source in sources.items()},
            "measures": {name: _json_value(v) for name, v in vars(self.evaluation).items()},
        }

    def data_record(self) -> DataRecord:
        """Return where the training data comes from, as run.json has it."""
        source, eval_source = _json_value(self.data), _json_value(self.eval_data)
        return DataRecord(
            source=str(source),
            eval_source=None if eval_source is None else str(eval_source),
            in_memory=not isinstance(self.data, Path | str) or None,
        )

    def finetune_job(self, task: MemberTask) -> FinetuneJob:
        """Return the member as a job of `lora finetune`; it generates no samples while training."""
        from lora.finetune.job import FinetuneJob  # which imports torch

        return FinetuneJob(
            data=self.data,
            model=self.model,
            implementation=self.implementation,
            eval_data=self.eval_data,
            **({} if task.method == "full" else self.base_settings),
            lora=None if task.method == "full" else self.lora,
            train=task.train,
            data_config=self.data_config,
            run=replace(task.run, samples=0),
            resume=task.resume,
        )


def _json_value(value: object) -> object:
    """Return a source or setting as run.json has it; of rows in memory only their number."""
    if value is None or isinstance(value, str | int | float | tuple | dict):
        return value
    if isinstance(value, Path):
        return str(value)
    return f"{len(list(cast(Iterable[Any], value)))} {IN_MEMORY}"
