"""The errors' tree and the helpers that word messages."""

from __future__ import annotations

import inspect

import pytest

import lora.errors
from lora.errors import LoraError, did_you_mean, gather

CHILDREN = [
    kind
    for _, kind in inspect.getmembers(lora.errors, inspect.isclass)
    if issubclass(kind, LoraError) and kind is not LoraError
]


@pytest.mark.parametrize("kind", CHILDREN)
def test_every_error_is_a_lora_error_and_in_the_drawn_tree(kind: type[LoraError]) -> None:
    assert kind.__bases__ == (LoraError,)
    assert f"── {kind.__name__} " in str(lora.errors.__doc__)
    assert kind.__doc__


def test_the_drawn_tree_has_no_other_errors() -> None:
    assert str(lora.errors.__doc__).count("── ") == len(CHILDREN) == 9


def test_the_nearest_word_is_offered() -> None:
    assert did_you_mean("q_prj", ["k_proj", "q_proj"]) == " Did you mean 'q_proj'?"


def test_nothing_is_offered_when_nothing_is_near() -> None:
    assert did_you_mean("q_prj", ["embedding"]) == ""
    assert did_you_mean("q_prj", []) == ""


def test_the_allowed_words_may_be_any_iterable() -> None:
    assert did_you_mean("rnk", {"rank": 8}) == " Did you mean 'rank'?"


def test_all_faults_are_listed_with_what_to_do() -> None:
    assert gather(["a", "b"], "Two faults:", "Mend them.") == (
        "Two faults:\n  - a\n  - b\nMend them."
    )


def test_many_faults_are_cut_off_with_their_number() -> None:
    message = gather([f"fault {i}" for i in range(15)], "Faults:", "Mend them.", most=3)
    assert "fault 2" in message
    assert "fault 3" not in message
    assert "… and 12 more" in message
    assert message.endswith("Mend them.")
