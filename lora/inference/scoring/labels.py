"""Classification scores of answers: accuracy, macro-F1 and the confusion matrix.

The labels are the different references. An answer counts as a label if it equals it but for upper
and lower case, white space and punctuation at the ends (`Refund.` is `refund`); labels that only
differ in these are compared as they are. An answer that is no label is wrong, and counted apart.

What differs from scikit-learn's macro average: only labels that occur as references are averaged,
as with its `labels=sorted(set(references))` and `zero_division=0`.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_LABELS = 200
"""Different references beyond which answers are not taken for labels by themselves."""
MAX_LABEL_WORDS = 5
MAX_LABEL_CHARACTERS = 60
MIN_REFERENCES_PER_LABEL = 2
"""On average; below it the references are answers of their own, such as names or numbers."""
_ENDS = string.whitespace + string.punctuation


@dataclass(frozen=True)
class LabelScores:
    """Scores of one label."""

    label: str
    precision: float
    """Of the answers with this label, the fraction that is right; 0 if there are none."""
    recall: float
    """Of the references with this label, the fraction that was answered with it."""
    f1: float
    n_references: int


@dataclass(frozen=True)
class Classification:
    """Scores of answers that are labels."""

    accuracy: float
    macro_f1: float
    """Mean of the labels' F1; each label counts the same."""
    labels: tuple[LabelScores, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Number of answers by reference (rows) and answered label (columns), in the order of `labels`;
    a last column counts answers that are no label."""

    @property
    def n_no_label(self) -> int:
        """Answers that are no label."""
        return sum(row[-1] for row in self.confusion)


def looks_like_labels(references: Sequence[str]) -> bool:
    """Return whether the references are few and short, as those of a classification are.

    That is: at least two and at most 200 different ones, each on average twice or more, on one line
    of at most five words and 60 characters.
    """
    distinct = {reference.strip() for reference in references}
    if not 2 <= len(distinct) <= MAX_LABELS:
        return False
    if len(references) < MIN_REFERENCES_PER_LABEL * len(distinct):
        return False
    return all(_is_short(label) for label in distinct)


def _is_short(label: str) -> bool:
    is_one_line = "\n" not in label and 0 < len(label) <= MAX_LABEL_CHARACTERS
    is_object = label.startswith(("{", "["))  # JSON, which has scores of its own
    return is_one_line and not is_object and len(label.split()) <= MAX_LABEL_WORDS


def label_finder(references: Sequence[str]) -> Callable[[str], str | None]:
    """Return a function from an answer to the label among `references` that it is, or None."""
    labels = sorted({reference.strip() for reference in references})
    by_key = {_key(label): label for label in labels}
    if len(by_key) == len(labels) and "" not in by_key:
        return lambda answer: by_key.get(_key(answer))
    known = set(labels)
    return lambda answer: answer.strip() if answer.strip() in known else None


def _key(text: str) -> str:
    return text.strip(_ENDS).casefold()


def classify(answers: Sequence[str], references: Sequence[str]) -> Classification:
    """Return the scores of `answers`, at least one, beside their references."""
    find = label_finder(references)
    pairs = Counter(
        (reference.strip(), find(answer))
        for answer, reference in zip(answers, references, strict=True)
    )
    names = sorted({reference.strip() for reference in references})
    columns: list[str | None] = [*names, None]
    confusion = tuple(tuple(pairs[name, column] for column in columns) for name in names)
    labels = tuple(_score_label(confusion, index, name) for index, name in enumerate(names))
    n_right = sum(confusion[index][index] for index in range(len(names)))
    macro = sum(label.f1 for label in labels) / len(labels)
    return Classification(n_right / len(answers), macro, labels, confusion)


def _score_label(confusion: tuple[tuple[int, ...], ...], index: int, name: str) -> LabelScores:
    right = confusion[index][index]
    n_answered = sum(row[index] for row in confusion)
    n_references = sum(confusion[index])
    precision = right / n_answered if n_answered else 0.0
    f1 = 2 * right / (n_answered + n_references)
    return LabelScores(name, precision, right / n_references, f1, n_references)
