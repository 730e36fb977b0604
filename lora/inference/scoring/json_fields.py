"""Scores of answers that are JSON: which parse, and which fields have the reference's value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldCounts:
    """How often the answers give the fields of their references the right value."""

    n_fields: int
    """Fields of all references."""
    n_right: int
    accuracy: dict[str, float]
    """By field: the fraction of the references with it whose answers give it the same value."""


def parse_json(text: str) -> object:
    """Return the JSON value in `text`; None if it holds none (or null)."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def right_fields(answer: str, reference: str) -> dict[str, bool]:
    """Return by field of a JSON reference whether the answer gives it the same value.

    Nothing if the reference is no JSON object.
    """
    value, expected = parse_json(answer), parse_json(reference)
    if not isinstance(expected, dict):
        return {}
    return {name: _has(value, name, wanted) for name, wanted in expected.items()}


def count_fields(answers: Sequence[str], references: Sequence[str]) -> FieldCounts | None:
    """Return how many fields are right; None unless all references are JSON objects."""
    if not all(isinstance(parse_json(reference), dict) for reference in references):
        return None
    found: dict[str, list[bool]] = {}
    for answer, reference in zip(answers, references, strict=True):
        for name, is_right in right_fields(answer, reference).items():
            found.setdefault(name, []).append(is_right)
    n_right = sum(map(sum, found.values()))
    accuracy = {name: sum(each) / len(each) for name, each in found.items()}
    return FieldCounts(sum(map(len, found.values())), n_right, accuracy)


def _has(value: object, name: str, expected: object) -> bool:
    if not isinstance(value, dict) or name not in value:
        return False
    found = value[name]
    # In Python True == 1; in JSON they differ.
    return found == expected and isinstance(found, bool) is isinstance(expected, bool)
