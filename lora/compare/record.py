"""What a comparison found, as `compare.json` has it, and how one member stands to another.

No torch here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from lora.errors import CheckpointError
from lora.runs.directory import Run
from lora.runs.disk import read_json
from lora.runs.read_record import step_times

Method = Literal["lora", "full", "peft"]
RateSource = Literal["sweep", "default", "given"]
Same = Literal["steps", "time"]
COMPARE_FILE, MEMBERS = "compare.json", "members"
METHOD_NAMES: dict[Method, str] = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "peft": "LoRA, PEFT",
}


@dataclass(frozen=True)
class RateTrial:
    """A learning rate that was tried before the comparison."""

    learning_rate: float
    eval_loss: float | None
    """Held-out loss at the end of the try, nats; None if it failed."""


@dataclass(frozen=True)
class RateChoice:
    """The learning rate of a member, and why it is this one."""

    learning_rate: float
    rate_chosen: RateSource
    rates_tried: tuple[RateTrial, ...] = ()
    steps_tried: int | None = None
    """Steps of each try."""


@dataclass(frozen=True)
class Forgetting:
    """Loss on another text than the one that is learned, nats a token."""

    text: str
    """Its name."""
    before: float
    after: float


@dataclass(frozen=True)
class TaskMetric:
    """A score of answers, 0 to 1."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Sample:
    """What was asked, and what was answered."""

    prompt: str
    expected: str | None
    """None where there is no one right answer."""
    answer: str


@dataclass(frozen=True)
class ModelEvaluation:
    """What is measured besides the training, on the base or on what was trained."""

    forgetting_text: str | None = None
    forgetting_loss: float | None = None
    metric_name: str | None = None
    metric: float | None = None
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class MemberResult:
    """What a member's training came to."""

    steps: int
    train_s: float
    """Seconds spent in steps; evaluations and saves left out."""
    peak_memory_bytes: int
    planned_memory_bytes: int | None
    trainable_parameters: int
    total_parameters: int
    stored_bytes: int
    """Of the tensors that were saved: the adapter, or all weights."""
    final_eval_loss: float
    best_eval_loss: float
    after: ModelEvaluation


@dataclass(frozen=True)
class Member:
    """One method's run in a comparison."""

    name: str
    method: Method
    folder: str
    """Its run's folder, relative to the comparison's."""
    learning_rate: float
    rate_chosen: RateSource
    rates_tried: tuple[RateTrial, ...]
    steps: int
    train_s: float
    step_s_median: float
    peak_memory_bytes: int
    planned_memory_bytes: int | None
    trainable_parameters: int
    total_parameters: int
    stored_bytes: int
    final_eval_loss: float
    best_eval_loss: float
    forgetting: Forgetting | None = None
    task_metric: TaskMetric | None = None
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All of `compare.json`."""

    base: str
    """The model that all members began from."""
    members: tuple[Member, ...]
    same: Same
    """What the members share besides base and data: the number of steps, or the time."""
    seed: int
    base_eval_loss: float | None = None
    """Held-out loss before any training, nats."""
    base_samples: tuple[Sample, ...] = ()
    device: str = ""
    rate_steps: int | None = None
    """Steps of each rate that was tried; None if none was."""
    notes: tuple[str, ...] = field(default=())
    """What a reader should know of how it was measured."""

    def member(self, method: Method) -> Member | None:
        """Return the member of this method; None if it did not take part."""
        return next((m for m in self.members if m.method == method), None)

    def write(self, run: Run) -> None:
        """Write `compare.json`, whole or not at all."""
        run.write_json(COMPARE_FILE, {"kind": "compare", **asdict(self)})


@dataclass(frozen=True)
class Ratios:
    """LoRA against another member: what it gains, above 1 (or below 0 for a loss) is LoRA's."""

    against: str
    step_speed: float
    """The other's time a step / LoRA's."""
    total_speed: float
    """The other's training time / LoRA's."""
    memory_saved: float
    """1 - LoRA's peak memory / the other's."""
    stored_fraction: float
    """LoRA's stored bytes / the other's."""
    trainable_fraction: float
    """LoRA's trained parameters / the other's."""
    loss_difference: float
    """LoRA's held-out loss at the end - the other's, nats."""


def ratios(comparison: Comparison) -> list[Ratios]:
    """Return LoRA against each other member."""
    lora = comparison.member("lora")
    if lora is None:
        return []
    return [
        Ratios(
            against=other.name,
            step_speed=other.step_s_median / lora.step_s_median,
            total_speed=other.train_s / lora.train_s,
            memory_saved=1 - lora.peak_memory_bytes / other.peak_memory_bytes,
            stored_fraction=lora.stored_bytes / other.stored_bytes,
            trainable_fraction=lora.trainable_parameters / other.trainable_parameters,
            loss_difference=lora.final_eval_loss - other.final_eval_loss,
        )
        for other in comparison.members
        if other is not lora
    ]


def build_member(
    method: Method, folder: Path, rate: RateChoice, trained: MemberResult, before: ModelEvaluation
) -> Member:
    """Return a member's record from what its run left in `folder` and what the base did before."""
    times = step_times(folder)
    after = trained.after
    forgetting = None
    if before.forgetting_loss is not None and after.forgetting_loss is not None:
        text = str(before.forgetting_text)
        forgetting = Forgetting(text, before.forgetting_loss, after.forgetting_loss)
    metric = None
    if before.metric is not None and after.metric is not None:
        metric = TaskMetric(str(before.metric_name), before.metric, after.metric)
    return Member(
        name=method,
        method=method,
        folder=f"{MEMBERS}/{folder.name}",
        learning_rate=rate.learning_rate,
        rate_chosen=rate.rate_chosen,
        rates_tried=rate.rates_tried,
        step_s_median=statistics.median(times),
        forgetting=forgetting,
        task_metric=metric,
        samples=after.samples,
        **{k: v for k, v in vars(trained).items() if k != "after"},
    )


def read_comparison(folder: Path) -> Comparison:
    """Return the comparison in `folder`. Raises CheckpointError if there is none that is whole."""
    path = folder / COMPARE_FILE
    values = read_json(path)
    if not isinstance(values, dict) or values.pop("kind", None) != "compare":
        raise CheckpointError(f"{path} is no comparison. Name the folder of a lora compare.")
    try:
        members = tuple(member_from(m) for m in values.pop("members"))
        samples = tuple(Sample(**s) for s in values.pop("base_samples"))
        notes = tuple(values.pop("notes"))
        return Comparison(members=members, base_samples=samples, notes=notes, **values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None


def member_from(values: dict[str, Any]) -> Member:
    """Return a member from its JSON values."""
    kept, metric = values["forgetting"], values["task_metric"]
    made: dict[str, Any] = {
        "forgetting": None if kept is None else Forgetting(**kept),
        "task_metric": None if metric is None else TaskMetric(**metric),
    }
    made["rates_tried"] = tuple(RateTrial(**t) for t in values["rates_tried"])
    made["samples"] = tuple(Sample(**s) for s in values["samples"])
    return Member(**{**values, **made})


def model_evaluation_from(values: dict[str, Any]) -> ModelEvaluation:
    """Return what was measured from its JSON values."""
    return ModelEvaluation(**{**values, "samples": tuple(Sample(**s) for s in values["samples"])})


def rate_choice_from(values: dict[str, Any]) -> RateChoice:
    """Return a rate from its JSON values."""
    tried = tuple(RateTrial(**t) for t in values["rates_tried"])
    return RateChoice(**{**values, "rates_tried": tried})


def best_rate(tried: Sequence[RateTrial]) -> float | None:
    """Return the rate with the lowest loss, the lower rate of equal ones; None if all failed."""
    done = [t for t in tried if t.eval_loss is not None]
    best = min(done, key=lambda t: (cast(float, t.eval_loss), t.learning_rate), default=None)
    return None if best is None else best.learning_rate


def edge_note(method: Method, rate: RateChoice) -> str | None:
    """Return what to say of a best rate that is the least or greatest of those tried."""
    rates = sorted(t.learning_rate for t in rate.rates_tried)
    if len(rates) < 2 or rate.learning_rate not in (rates[0], rates[-1]):
        return None
    side = "highest" if rate.learning_rate == rates[-1] else "lowest"
    return (
        f"the best rate of {METHOD_NAMES[method]}, {rate.learning_rate:g}, is the {side} that was "
        "tried: a better one may lie beyond"
    )
