"""What an evaluation asks of a model, and which scores its answers get. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from lora.config import GENERATION, MAX_COUNT
from lora.errors import ConfigError, DataError, did_you_mean, gather
from lora.inference.scoring.json_fields import count_fields
from lora.inference.scoring.labels import looks_like_labels

AnswerMetric = Literal["auto", "exact-match", "json-fields", "classification", "rouge-l", "bleu"]
METRICS: tuple[AnswerMetric, ...] = get_args(AnswerMetric)
MAX_CONFUSION_LABELS = 1000
"""Beyond it the references of a classification are taken for a mistake."""


@dataclass(frozen=True)
class EvalConfig:
    """Which examples are answered, and how the answers are scored."""

    answers: int | Literal["all"] | None = field(default=None, metadata=GENERATION)
    """Examples to answer and score: a number, or all. Default: all with `metrics` or
    --predictions, else none.

    Without answers only the loss is measured."""
    metrics: tuple[str, ...] = field(default=("auto",), metadata=GENERATION)
    """Scores: exact-match, json-fields, classification, rouge-l, bleu; auto: the first three, where
    they fit.

    auto takes exact-match, json-fields if each reference is a JSON object, and classification if
    the references are few and short: see `lora.inference.scoring.labels`. rouge-l and bleu need
    lora-lm[eval]."""
    base: bool = field(default=True, metadata=GENERATION)
    """Evaluate the base model beside its adapter."""

    def __post_init__(self) -> None:
        words = self.metrics if isinstance(self.metrics, list | tuple) else (self.metrics,)
        split = tuple(part.strip() for word in words for part in str(word).split(","))
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(split)))
        faults = [
            f"metrics={name!r}: must be one of {', '.join(METRICS)}.{did_you_mean(name, METRICS)}"
            for name in self.metrics
            if name not in METRICS
        ]
        count = self.answers
        is_count = isinstance(count, int) and not isinstance(count, bool)
        if not (count in ("all", None) or (is_count and 0 <= int(count) <= MAX_COUNT)):
            faults.append(f"answers={count!r}: must be all, 0 (none) or a positive whole number")
        if count == 0 and self.has_metrics:
            faults.append("answers=0 with metrics: there are no answers to score")
        if faults:
            raise ConfigError(gather(faults, "Cannot evaluate:", "Try --answers 40."))

    @property
    def has_metrics(self) -> bool:
        """Whether metrics are named."""
        return any(name != "auto" for name in self.metrics)

    def n_to_answer(self, n_examples: int, *, is_default_all: bool = False) -> int:
        """Return how many of `n_examples` are answered; `is_default_all` where none is said."""
        if self.answers is None:
            return n_examples if self.has_metrics or is_default_all else 0
        return n_examples if self.answers == "all" else min(int(self.answers), n_examples)


def choose_metrics(asked: Sequence[str], references: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics to compute: `asked`, with those that fit the references for auto.

    Raises DataError if one that is asked for does not fit them.
    """
    named = [name for name in asked if name != "auto"]
    if named:
        _check_fit(named, references)
    if "auto" not in asked:
        return tuple(named)
    fitting = ["exact-match"]
    if references and count_fields(references, references) is not None:
        fitting.append("json-fields")
    if looks_like_labels(references):
        fitting.append("classification")
    return tuple(dict.fromkeys((*fitting, *named)))


def _check_fit(named: Sequence[str], references: Sequence[str]) -> None:
    if not references:
        raise DataError(
            f"Cannot compute {', '.join(named)}: no example has a question and an answer. Name "
            "examples with both, or leave --metrics out to get the loss."
        )
    if "json-fields" in named and count_fields(references, references) is None:
        raise DataError(
            "Cannot compute json-fields: not every reference answer is a JSON object. Leave it "
            "out, or try exact-match."
        )
    n_labels = len({reference.strip() for reference in references})
    if "classification" in named and n_labels > MAX_CONFUSION_LABELS:
        raise DataError(
            f"Cannot compute classification: there are {n_labels:,} different reference answers. "
            f"Allowed: at most {MAX_CONFUSION_LABELS:,} labels. Try exact-match."
        )
