"""Names of columns that hold a question and its answer, as published data sets have them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A question's column with the columns that may hold its answer and its context."""

    question: str
    answers: tuple[str, ...]
    """The first that has a value is learned."""
    context: tuple[str, ...] = ()
    """Columns whose texts follow the question."""
    is_before_text: bool = False
    """Whether a column text beside it is a rendering of the row, and not the text to learn."""

    @property
    def format(self) -> str:
        """Its name in reports."""
        return f"{self.question} and {self.answers[0]}"


CHOICES = ("choices", "options")
"""Columns of a question with the answers to choose from: a list, or texts with their labels."""
_QUESTION_CONTEXT = ("context", "article", *CHOICES)
PAIRS = (
    Pair("instruction", ("output", "response", "answer"), ("input", "context"), True),
    Pair("question", ("answer", "response", "output", "answerKey"), _QUESTION_CONTEXT),
    Pair("prompt", ("response", "output", "answer"), ("context",)),
    Pair("query", ("response", "answer", "output"), ("context",)),
    Pair("input", ("output", "response", "target"), ("context",)),
    Pair("inputs", ("targets", "outputs")),
    Pair("problem", ("solution",)),
    Pair("article", ("summary", "highlights")),
    Pair("document", ("summary",)),
    Pair("dialogue", ("summary",)),
    Pair("message_1", ("message_2",)),
    Pair("INSTRUCTION", ("RESPONSE",)),
)
"""In the order in which they are tried."""
PAIR_COLUMNS = tuple(dict.fromkeys(name for p in PAIRS for name in (p.question, *p.answers)))


def find_pair(columns: Set[str]) -> Pair | None:
    """Return the pair that a row with these columns has; None if it has none."""
    for pair in PAIRS:
        if pair.question in columns and columns & set(pair.answers):
            return pair if pair.is_before_text or "text" not in columns else None
    return None
