"""Accuracy, macro-F1 and the confusion matrix, beside values computed by hand."""

from __future__ import annotations

import pytest

from lora.inference.scoring.labels import classify, label_finder, looks_like_labels

REFERENCES = ["refund", "refund", "refund", "bug", "bug", "question"]
ANSWERS = ["Refund.", "refund", "bug", " bug\n", "I think it is a bug", "bug"]


def test_scores_are_those_computed_by_hand() -> None:
    found = classify(ANSWERS, REFERENCES)
    assert [label.label for label in found.labels] == ["bug", "question", "refund"]
    # rows: expected; columns: answered bug, question, refund, no label
    assert found.confusion == ((1, 0, 0, 1), (1, 0, 0, 0), (1, 0, 2, 0))
    assert found.n_no_label == 1
    assert found.accuracy == pytest.approx(3 / 6)
    bug, question, refund = found.labels
    assert (bug.precision, bug.recall) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    assert bug.f1 == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert (question.precision, question.recall, question.f1) == (0, 0, 0)
    assert (refund.precision, refund.recall) == (1, pytest.approx(2 / 3))
    assert refund.f1 == pytest.approx(0.8)
    assert found.macro_f1 == pytest.approx((0.4 + 0 + 0.8) / 3)
    assert [label.n_references for label in found.labels] == [2, 1, 3]


def test_labels_that_differ_in_case_or_punctuation_only_are_compared_as_they_are() -> None:
    find = label_finder(["A", "a", "b"])
    assert [find(text) for text in ("A", " a ", "B", "b.")] == ["A", "a", None, None]
    signs = label_finder(["+", "-"])
    assert [signs(text) for text in ("+", "-", "+-")] == ["+", "-", None]
    assert label_finder(["spam", "not spam"])('"Not spam"') == "not spam"


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["yes", "no"] * 2, True),
        (["yes", "no"], False),  # each once: answers of their own
        (["yes"] * 9, False),
        (["4", "7", "12", "4"], False),
        (["very good indeed, all in all", "bad"] * 5, False),  # six words
        (['{"a": 1}', '{"a": 2}'] * 5, False),
        (["one\ntwo", "three"] * 5, False),
        ([], False),
    ],
)
def test_few_and_short_references_look_like_labels(references: list[str], expected: bool) -> None:
    assert looks_like_labels(references) is expected
