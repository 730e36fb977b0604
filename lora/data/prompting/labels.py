"""Classification: the prompt that lists the labels, made of the labels themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora.data.prompting.row_template import RowTemplate, parse_template

MAX_LISTED_LABELS = 50
MAX_LISTED_CHARACTERS = 1000
"""Of the labels in a prompt: beyond these they are learned from the examples alone."""


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels in an order that depends on nothing else: numbers by value."""
    found = set(labels)
    try:
        return tuple(sorted(found, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(found, key=lambda label: (label.casefold(), label)))


def label_template(labels: Sequence[str]) -> RowTemplate:
    """Return the template of rows with the columns text and label; equal labels give an equal one.

    It lists the labels unless they are many or long.
    """
    listed = ", ".join(labels)
    if len(labels) > MAX_LISTED_LABELS or len(listed) > MAX_LISTED_CHARACTERS:
        task = "Which label fits the text? Answer with the label alone."
    else:
        task = f"Which label fits the text? Answer with one of: {_escaped(listed)}."
    return parse_template(f"{task}\n\nText: {{text}}\n\nLabel: {{label}}", has_escapes=False)


def _escaped(text: str) -> str:
    text = text.replace("{", "{{").replace("}", "}}")
    return text.replace("[[", "[ [").replace("]]", "] ]")  # brackets would mark what is learned
