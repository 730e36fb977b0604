"""Loss flags of messages and rows: off is context, anything unclear is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from lora.data.reading.formats import Example, example_from_row
from lora.errors import DataError

QUESTION, AGAIN = {"role": "user", "content": "Price?"}, {"role": "user", "content": "Look again"}
WRONG, RIGHT = "WRONG ninety", "It is twelve"


def chat(**flags: Any) -> list[dict[str, Any]]:
    wrong = {"role": "assistant", "content": WRONG, **flags}
    return [QUESTION, wrong, AGAIN, {"role": "assistant", "content": RIGHT}]


def read(row: Any) -> Example:
    return example_from_row(row, "f:1")


SHAREGPT = [
    {"from": "human", "value": "Price?"},
    {"from": "gpt", "value": WRONG, "weight": 0},
    {"from": "human", "value": "Look again"},
    {"from": "gpt", "value": RIGHT},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat(weight=0)},
        {"messages": chat(weight=0.0)},
        {"messages": chat(train=False)},
        {"messages": chat(trainable=False, weight=0)},
        {"messages": chat(training="false")},
        {"messages": chat(loss=0)},
        {"messages": chat(loss_mask=0)},
        {"messages": chat(), "loss_mask": [0, 0, 0, 1]},
        {"messages": chat(), "loss_mask": "[0, 0, 0, 1]"},
        {"messages": chat(), "train": [False, False, False, True]},
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT, "system": "S"},
        {"prompt": chat()[:1], "completion": chat(weight=0)[1:]},
    ],
)
def test_a_flagged_answer_is_context(row: dict[str, Any]) -> None:
    example = read(row)
    assert example.messages is not None
    assert [example.messages[number]["content"] for number in example.answers] == [RIGHT]
    assert not example.is_context
    roles_and_contents = [sorted(m) for m in example.messages]
    assert roles_and_contents == [["content", "role"]] * len(
        example.messages
    )  # no template sees it


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat(), "weight": 0},
        {"text": "t", "train": False},
        {"text": "t", "weight": "0"},
        {"prompt": "p", "completion": "c", "trainable": 0},
        {"instruction": "q", "output": "a", "loss": False},
        {"question": "q", "answer": "a", "loss_mask": 0},
    ],
)
def test_a_flagged_row_is_context_as_a_whole(row: dict[str, Any]) -> None:
    assert read(row).is_context


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat(weight=1)},
        {"messages": chat(weight=None)},
        {"messages": [{**QUESTION, "weight": 1}, *chat()[1:]]},
        {"messages": chat(), "weight": 1},
        {"messages": chat(), "train": None},
        {"text": "t", "weight": "", "train": "true"},
    ],
)
def test_flags_that_are_on_change_nothing(row: dict[str, Any]) -> None:
    assert not read(row).off_flags


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": chat(weight=0.5)}, r"messages\[1\].weight is 0.5: a loss flag must be 0, 1"),
        ({"messages": chat(train="maybe")}, r"messages\[1\].train is 'maybe'"),
        ({"messages": chat(train=True, weight=0)}, r"\[1\].weight and .*\[1\].train disagree"),
        ({"messages": [{**QUESTION, "train": True}, *chat()[1:]]}, r"\[0\].train asks to learn"),
        (
            {"messages": chat(), "loss_mask": [1, 0, 0, 1]},
            r"loss_mask\[0\] asks to learn a message",
        ),
        ({"messages": chat(), "loss_mask": [0, 1]}, "loss_mask has 2 values for 4 messages"),
        ({"text": "t", "loss_mask": [0, 1]}, "loss_mask has 2 values for 0 messages"),
        ({"text": "t", "loss": 2.31}, "loss is 2.31: a loss flag must be"),
        ({"text": "t", "weight": {"kg": 3}}, "weight is an object: a loss flag must be"),
        (
            {"prompt": chat(train=True)[:3], "completion": chat()[3:]},
            r"prompt\[1\].train asks to learn part of the prompt",
        ),
    ],
)
def test_a_flag_that_cannot_be_honoured_is_refused_by_name(row: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(row)


def test_equal_texts_with_other_flags_are_not_copies() -> None:
    assert (
        read({"messages": chat(weight=0)}).content_key() != read({"messages": chat()}).content_key()
    )
