"""Metrics of answers: which parse as JSON, which fields are correct, which examples have none."""

from __future__ import annotations

import json
import math

import pytest

from lora.inference.evaluation import Answer, score, wrong_fields

REFERENCE = json.dumps({"item": "lamp", "quantity": 1, "express": True})


def answers(*texts: str, reference: str = REFERENCE) -> list[Answer]:
    return [Answer("a note", text, reference) for text in texts]


def test_right_wrong_and_broken_answers_are_counted() -> None:
    wrong_item = json.dumps({"express": True, "quantity": 1, "item": "mug", "more": 0})
    found = score(0.5, answers(f" {REFERENCE}\n", wrong_item, REFERENCE[:-1], "[1]"))
    assert (found.loss, found.n_answers) == (0.5, 4)
    assert found.perplexity == pytest.approx(math.exp(0.5))
    assert (found.exact_match, found.valid_json) == (1, 3)
    assert (found.fields_right, found.n_fields) == (3 + 2, 12)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"item": "lamp", "quantity": true, "express": 1}', 1),
        ('{"item": "Lamp", "quantity": "1"}', 0),
        ('{"quantity": 1.0}', 1),
        ("{}", 0),
    ],
)
def test_a_field_is_right_if_json_calls_it_equal(answer: str, right: int) -> None:
    assert score(0.0, answers(answer)).fields_right == right


def test_wrong_fields_are_named_in_the_reference_s_order() -> None:
    wrong = '{"express": false, "item": "lamp", "quantity": 2, "more": 1}'
    assert wrong_fields(answers(wrong)[0]) == ["quantity", "express"]
    assert wrong_fields(answers("no JSON")[0]) == ["item", "quantity", "express"]
    assert wrong_fields(answers(REFERENCE)[0]) == []


def test_a_missing_field_is_not_null() -> None:
    found = score(0.0, answers("{}", '{"city": null}', reference='{"city": null}'))
    assert (found.fields_right, found.n_fields) == (1, 2)


def test_references_that_are_no_objects_have_no_fields_and_plain_ones_no_json() -> None:
    listed = score(0.0, answers("[1]", "1", "x", reference="[1]"))
    assert (listed.valid_json, listed.n_fields, listed.fields_right) == (2, None, None)
    plain = score(0.0, answers("Paris", "{}", reference="Paris"))
    assert (plain.valid_json, plain.fields_right, plain.exact_match) == (None, None, 1)


def test_without_answers_there_is_only_the_loss() -> None:
    found = score(1000.0, [])
    assert (found.n_answers, found.exact_match, found.valid_json) == (0, None, None)
    assert math.isfinite(found.perplexity)


def test_bleu_of_equal_texts_is_a_hundred() -> None:
    pytest.importorskip("sacrebleu")
    sentence = "four words are enough here"
    found = score(0.0, answers(sentence, reference=sentence), bleu=True)
    assert found.bleu == pytest.approx(100)
