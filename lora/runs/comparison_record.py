"""The record of a comparison: what compare.json holds, as typed, versioned dataclasses. No torch.

`lora.compare` writes it, `lora compare` and the report read it. Losses are in nats per target
token, times in seconds, sizes in bytes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lora.runs.directory import Run
from lora.runs.read_record import file_version, read_record_file
from lora.runs.record import Method
from lora.runs.typed_json import Faults

SCHEMA_VERSION = 1
"""Of compare.json; grows when a key changes its meaning. Files of version 0 have no such key, and
otherwise the keys of version 1."""
COMPARE_FILE, MEMBERS = "compare.json", "members"
RateSource = Literal["sweep", "default", "given"]
Same = Literal["steps", "time"]
METHOD_NAMES: dict[Method, str] = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "peft": "LoRA, PEFT",
}


@dataclass(frozen=True)
class RateTrial:
    """A short training run at one learning rate, made before the comparison to choose it."""

    learning_rate: float
    eval_loss: float | None
    """Validation loss at its end; None if the run failed."""


@dataclass(frozen=True)
class Forgetting:
    """Loss on another text than the training data, before and after training."""

    text: str
    """Its name."""
    before: float
    after: float


@dataclass(frozen=True)
class TaskMetric:
    """A score of generated answers, 0 to 1, before and after training."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Sample:
    """A prompt and the model's answer to it."""

    prompt: str
    expected: str | None
    """The answer in the data; None where there is no single right one."""
    answer: str
    step: int | None = None
    """Training steps before the answer; None in a comparison, whose members answer at their end."""
    is_cut: bool = False
    """Whether the answer was cut off at the maximum number of tokens."""


@dataclass(frozen=True)
class Member:
    """One method's run in a comparison."""

    name: str
    method: Method
    folder: str
    """Its run directory, relative to the comparison's."""
    learning_rate: float
    """The peak."""
    rate_chosen: RateSource
    """Where the learning rate comes from: the best of `rates_tried`, the default, the user."""
    rates_tried: tuple[RateTrial, ...]
    steps: int
    train_s: float
    """In steps; evaluations and saves left out."""
    step_s_median: float
    peak_memory_bytes: int
    planned_memory_bytes: int | None
    trainable_parameters: int
    total_parameters: int
    stored_bytes: int
    """Of the saved tensors: the adapter, or all weights."""
    final_eval_loss: float
    """Validation loss after the last step."""
    best_eval_loss: float
    saved_step: int | None = None
    """The step whose weights were saved and evaluated; None in files of older versions, which saved
    the last."""
    saved_eval_loss: float | None = None
    forgetting: Forgetting | None = None
    task_metric: TaskMetric | None = None
    samples: tuple[Sample, ...] = ()
    base_dtype: str | None = None
    """How its frozen base is stored, if not in the compute dtype."""

    @property
    def figures(self) -> RunFigures:
        """What the ratios to other members are computed from."""
        has_saved_loss = self.saved_eval_loss is not None and math.isfinite(self.saved_eval_loss)
        return RunFigures(
            name=self.name,
            step_s=self.step_s_median,
            train_s=self.train_s,
            peak_memory_bytes=self.peak_memory_bytes,
            trainable_parameters=self.trainable_parameters,
            stored_bytes=self.stored_bytes,
            eval_loss=self.saved_eval_loss if has_saved_loss else self.final_eval_loss,
        )


@dataclass(frozen=True)
class Comparison:
    """All of compare.json."""

    base: str
    """The model that all members start from."""
    members: tuple[Member, ...]
    same: Same
    """What the members share besides base and data: the number of steps, or the time in steps."""
    seed: int
    base_eval_loss: float | None = None
    """Validation loss before any training."""
    base_samples: tuple[Sample, ...] = ()
    device: str = ""
    rate_steps: int | None = None
    """Steps of each trial of a learning rate; None if there were no trials."""
    notes: tuple[str, ...] = ()
    """What a reader should know about how it was measured."""
    kind: Literal["compare"] = "compare"
    schema_version: int = SCHEMA_VERSION

    def member(self, method: Method) -> Member | None:
        """Return the member of this method; None if it did not take part."""
        return next((m for m in self.members if m.method == method), None)


@dataclass(frozen=True)
class RunFigures:
    """Time, memory, size and loss of a run; None where unknown."""

    name: str
    step_s: float | None
    """Median of a step."""
    train_s: float | None
    """Of all steps."""
    peak_memory_bytes: int | None
    trainable_parameters: int | None
    stored_bytes: int | None
    eval_loss: float | None
    """Validation loss of the weights that were saved."""


@dataclass(frozen=True)
class Ratios:
    """A LoRA run against another run. Above 1 (below 0 for the loss) is in favour of LoRA."""

    run: str
    against: str
    step_speed: float | None
    """The other's time per step / LoRA's."""
    total_speed: float | None
    """The other's time in all steps / LoRA's."""
    memory_saved: float | None
    """1 - LoRA's peak memory / the other's."""
    trainable_fraction: float | None
    """LoRA's trainable parameters / the other's."""
    stored_fraction: float | None
    """LoRA's stored bytes / the other's."""
    loss_difference: float | None
    """LoRA's validation loss, of the weights that were saved, - the other's, nats."""


def ratios(one: RunFigures, other: RunFigures) -> Ratios:
    """Return `one` against `other`; None for a ratio of which a figure is unknown or zero."""
    memory = _quotient(one.peak_memory_bytes, other.peak_memory_bytes)
    difference = None
    if one.eval_loss is not None and other.eval_loss is not None:
        difference = one.eval_loss - other.eval_loss
    return Ratios(
        run=one.name,
        against=other.name,
        step_speed=_quotient(other.step_s, one.step_s),
        total_speed=_quotient(other.train_s, one.train_s),
        memory_saved=None if memory is None else 1 - memory,
        trainable_fraction=_quotient(one.trainable_parameters, other.trainable_parameters),
        stored_fraction=_quotient(one.stored_bytes, other.stored_bytes),
        loss_difference=difference,
    )


def lora_ratios(comparison: Comparison) -> list[Ratios]:
    """Return LoRA against each other member."""
    lora = comparison.member("lora")
    if lora is None:
        return []
    others = (member for member in comparison.members if member is not lora)
    return [ratios(lora.figures, other.figures) for other in others]


def write_comparison(run: Run, comparison: Comparison) -> None:
    """Write compare.json into the run directory, whole or not at all."""
    run.write_json(COMPARE_FILE, asdict(comparison))


def read_comparison(directory: Path, faults: Faults | None = None) -> Comparison | None:
    """Return the comparison in `directory`; None if it is not finished: there is no compare.json.

    A file that an older version wrote is read, one that a newer version wrote is refused.
    """
    return read_record_file(Comparison, directory / COMPARE_FILE, faults, upgrade=_upgraded)


def _upgraded(values: dict[str, Any], where: str, faults: Faults) -> dict[str, Any]:
    """Return the values of a compare.json as version 1 has them: version 0 had the same keys."""
    file_version(values, 0, SCHEMA_VERSION, where, faults)
    return values


def _quotient(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None
