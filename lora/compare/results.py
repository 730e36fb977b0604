"""The results of a comparison's stages, and checks that its members can be compared.

    base.json                  BaseResult      the base model, evaluated before any training
    rates/METHOD.json          RateChoice      the learning rate of a method, and its trials
    timing/METHOD.json         StepTiming      how many steps take as long as LoRA's
    members/NAME/member.json   MemberResult    a member, trained and evaluated

Each is a JSON file that a resumed comparison reads again. No torch here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lora.config import ImplementationName
from lora.errors import CheckpointError
from lora.runs.comparison_record import (
    MEMBERS,
    METHOD_NAMES,
    Forgetting,
    Member,
    RateSource,
    RateTrial,
    Sample,
    TaskMetric,
)
from lora.runs.read_record import read_metrics, read_run_record, step_times
from lora.runs.record import Method

MAX_START_LOSS_DIFFERENCE = 0.02
"""Relative difference of losses before the first step, in bf16 too."""


@dataclass(frozen=True)
class RateChoice:
    """The learning rate of a member, and where it comes from."""

    learning_rate: float
    rate_chosen: RateSource
    rates_tried: tuple[RateTrial, ...] = ()
    steps_tried: int | None = None
    """Steps of each trial."""


@dataclass(frozen=True)
class StepTiming:
    """The time of a step, and how many steps LoRA's time in steps holds."""

    step_s: float
    steps: int


@dataclass(frozen=True)
class ModelEvaluation:
    """What is evaluated besides the validation loss, of the base or of a trained member."""

    forgetting_text: str | None = None
    """Name of the other text."""
    forgetting_loss: float | None = None
    """Loss on it, nats."""
    metric_name: str | None = None
    metric: float | None = None
    """0 to 1."""
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class BaseResult:
    """The base model before any training."""

    name: str
    device: str
    """Which device it computes on, and why."""
    eval_loss: float
    """Validation loss, nats."""
    measured: ModelEvaluation
    n_sequences: int | None = None
    """For training; None where only the caller's factory knows."""
    implementation: ImplementationName | None = None
    """The code that runs the model; None for models of a factory."""
    quantised_eval_loss: float | None = None
    """The validation loss over the base as LoRA's members store it; None: as the base is."""

    def start_loss(self, method: Method) -> float:
        """Return the validation loss that a member of this method should begin with."""
        is_quantised = self.quantised_eval_loss is not None and method != "full"
        return cast(float, self.quantised_eval_loss) if is_quantised else self.eval_loss


@dataclass(frozen=True)
class MemberResult:
    """A member's training, and the evaluation of what it saved."""

    steps: int
    train_s: float
    """In steps; evaluations and saves left out."""
    peak_memory_bytes: int
    planned_memory_bytes: int | None
    trainable_parameters: int
    total_parameters: int
    stored_bytes: int
    """Of the saved tensors: the adapter, or all weights."""
    final_eval_loss: float
    best_eval_loss: float
    after: ModelEvaluation
    saved_step: int | None = None
    """The step whose weights were saved and evaluated; None in files of older versions."""
    saved_eval_loss: float | None = None


def build_member(
    method: Method, folder: Path, rate: RateChoice, result: MemberResult, before: ModelEvaluation
) -> Member:
    """Return a member's record; `folder` is its run directory, `before` evaluates the base."""
    after = result.after
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
        step_s_median=statistics.median(step_times(folder)),
        base_dtype=read_run_record(folder).base_dtype,
        forgetting=forgetting,
        task_metric=metric,
        samples=after.samples,
        **{k: v for k, v in vars(result).items() if k != "after"},
    )


def best_learning_rate(trials: Sequence[RateTrial]) -> float | None:
    """Return the learning rate with the lowest loss, the lower one of equals; None if all failed.

    A trial whose loss is not finite has failed too.
    """
    done = [t for t in trials if t.eval_loss is not None and math.isfinite(t.eval_loss)]
    best = min(done, key=lambda t: (cast(float, t.eval_loss), t.learning_rate), default=None)
    return None if best is None else best.learning_rate


def edge_note(method: Method, rate: RateChoice) -> str | None:
    """Return a note if the best learning rate is the lowest or the highest of its trials."""
    rates = sorted(t.learning_rate for t in rate.rates_tried)
    if len(rates) < 2 or rate.learning_rate not in (rates[0], rates[-1]):
        return None
    side = "highest" if rate.learning_rate == rates[-1] else "lowest"
    return (
        f"the best learning rate of {METHOD_NAMES[method]}, {rate.learning_rate:g}, is the {side} "
        "of those tried: a better one may lie beyond"
    )


def start_loss_notes(folder: Path, members: list[Member], base: BaseResult) -> list[str]:
    """Return a note for each member whose loss before its first step differs from the base's."""
    notes = []
    for member in members:
        losses = (row.eval_loss for row in read_metrics(folder / member.folder))
        expected = base.start_loss(member.method)
        first = next((loss for loss in losses if loss), expected)
        if abs(first - expected) > MAX_START_LOSS_DIFFERENCE * abs(expected):
            stored = "" if member.base_dtype is None else f" in {member.base_dtype}"
            notes.append(
                f"{METHOD_NAMES[member.method]} starts at a validation loss of {first:.4f}, the "
                f"base{stored} has {expected:.4f}: it does not compute what the others compute"
            )
    return notes


def base_notes(members: list[Member], base: BaseResult) -> list[str]:
    """Return a note on a base that is quantised for some of the members."""
    stored = [member for member in members if member.base_dtype is not None]
    if not stored or base.quantised_eval_loss is None:
        return []
    names = " and ".join(METHOD_NAMES[member.method] for member in stored)
    return [
        f"{names}: over a base in {stored[0].base_dtype}, whose validation loss is "
        f"{base.quantised_eval_loss:.4f} before training ({base.eval_loss:.4f} in the compute "
        "dtype); full fine-tuning trains the unquantised weights. Losses and scores called "
        '"before" are those of the unquantised base'
    ]


def check_same_data(folder: Path, members: list[Member]) -> None:
    """Raise CheckpointError unless all members trained on the same data in the same order."""
    seen = {}
    for member in members:
        data = read_run_record(folder / member.folder).data
        rows = read_metrics(folder / member.folder)
        # A skipped step's tokens do not count: the sums differ from there on, the data do not.
        first_skipped = min((row.step for row in rows if row.skipped is not None), default=math.inf)
        tokens = {
            row.step: row.tokens
            for row in rows
            if row.tokens is not None and row.step < first_skipped
        }
        seen[member.name] = (data.fingerprint, data.held_out_fingerprint), tokens
    (first, (fingerprints, tokens)), *others = seen.items()
    for name, (other_fingerprints, other_tokens) in others:
        common = tokens.keys() & other_tokens.keys()
        if fingerprints != other_fingerprints or any(tokens[n] != other_tokens[n] for n in common):
            raise CheckpointError(
                f"Cannot compare the members {first} and {name} of {folder}: they did not train on "
                "the same sequences in the same order. The data changed between them, or the date "
                "in the chat template did. Start a new comparison."
            )
