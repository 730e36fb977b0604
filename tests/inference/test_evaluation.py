"""Metrics of answers: which parse as JSON, which fields are correct, which examples have none."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lora.errors import ConfigError, DataError
from lora.inference.answers import Answer
from lora.inference.eval_config import EvalConfig, choose_metrics
from lora.inference.evaluation import score, wrong_fields

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


def test_the_accuracy_of_each_field_is_told() -> None:
    wrong = json.dumps({"item": "lamp", "quantity": 2, "express": True})
    found = score(0.0, [*answers(REFERENCE, wrong), *answers("{}", reference='{"item": "mug"}')])
    assert found.field_accuracy == {
        "item": pytest.approx(2 / 3),
        "quantity": 0.5,
        "express": 1.0,
    }


def test_labels_are_scored_where_the_references_are_few_and_short() -> None:
    labelled = [Answer("p", text, ref) for text, ref in zip("abba", "abab", strict=True)]
    found = score(0.0, labelled).classification
    assert found is not None
    assert (found.accuracy, found.macro_f1) == (0.5, 0.5)
    assert score(0.0, labelled[:2]).classification is None
    assert score(0.0, labelled[:2], ("classification",)).classification is not None


def test_reasoning_is_left_out_of_the_comparison() -> None:
    thought = Answer("p", "<think>\n1 + 1 …</think>\n\n2", "2")
    assert thought.is_exact
    assert score(0.0, [thought]).exact_match == 1
    taught = "<think>easy</think>2"
    assert Answer("p", taught, taught).is_exact
    assert not Answer("p", "<think>hard</think>2", taught).is_exact


@pytest.mark.parametrize(
    ("asked", "references", "seen"),
    [
        (["json-fields"], ["Paris"], "not every reference answer is a JSON object"),
        (["rouge-l"], [], "no example has a question and an answer"),
        (["classification"], [str(n) for n in range(1001)], "1,001 different reference answers"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(
    asked: list[str], references: list[str], seen: str
) -> None:
    with pytest.raises(DataError, match=seen):
        choose_metrics(asked, references)


def test_auto_is_what_fits_beside_what_is_named() -> None:
    assert choose_metrics(["auto"], ["Paris", "Rome"]) == ("exact-match",)
    assert choose_metrics(["auto"], ['{"a": 1}']) == ("exact-match", "json-fields")
    assert choose_metrics(["auto", "bleu"], ["a", "b"] * 2) == (
        "exact-match",
        "classification",
        "bleu",
    )


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"metrics": ("rogue-l",)}, "Did you mean 'rouge-l'"),
        ({"answers": -1}, "answers=-1: must be all, 0"),
        ({"answers": "some"}, "answers='some': must be all"),
        ({"answers": 0, "metrics": ("bleu",)}, "there are no answers to score"),
    ],
)
def test_wrong_settings_of_an_evaluation_are_refused(given: dict[str, Any], seen: str) -> None:
    with pytest.raises(ConfigError, match=seen):
        EvalConfig(**given)


def test_all_examples_are_answered_where_scores_are_asked_for() -> None:
    assert EvalConfig().n_to_answer(9) == 0
    assert EvalConfig().n_to_answer(9, is_default_all=True) == 9
    assert EvalConfig(metrics=("bleu,rouge-l",)).n_to_answer(9) == 9
    assert EvalConfig(answers="all").n_to_answer(9) == 9
    assert EvalConfig(answers=4).n_to_answer(9) == EvalConfig(answers=4).n_to_answer(4) == 4
