"""Columns beside the format's own: context reaches the prompt or is refused, others are named."""

from __future__ import annotations

from typing import Any

import pytest

from lora.data.reading.formats import Example, example_from_row
from lora.errors import DataError

HI, AVE = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Ave"}
LATIN = {"role": "system", "content": "SPEAK LATIN"}


def read(row: Any) -> Example:
    return example_from_row(row, "f:1")


def contents(row: Any) -> list[str]:
    return [message["content"] for message in read(row).messages or ()]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system": "SPEAK LATIN", "messages": [HI, AVE]}, ["SPEAK LATIN", "hi", "Ave"]),
        (
            {"system": "SPEAK LATIN", "prompt": [HI], "completion": [AVE]},
            ["SPEAK LATIN", "hi", "Ave"],
        ),
        ({"system": "SPEAK LATIN", "messages": [LATIN, HI, AVE]}, ["SPEAK LATIN", "hi", "Ave"]),
        (
            {"system_prompt": "SPEAK LATIN", "question": "hi", "response": "Ave"},
            ["SPEAK LATIN", "hi", "Ave"],
        ),
        (
            {"instruction": "Now", "input": "", "output": "C", "history": [["Say hi", "Ave"]]},
            ["Say hi", "Ave", "Now", "C"],
        ),
        (
            {"instruction": "Now", "output": "C", "history": "[['Say hi', 'Ave']]"},
            ["Say hi", "Ave", "Now", "C"],
        ),
        ({"question": "Now", "answer": "C", "history": [HI, AVE]}, ["hi", "Ave", "Now", "C"]),
        (
            {"instruction": "When?", "input": "", "context": "In 753.", "output": "753"},
            ["When?\n\nIn 753.", "753"],
        ),
        (
            {"instruction": "When?", "input": None, "context": "In 753.", "output": "753"},
            ["When?\n\nIn 753.", "753"],
        ),
        (
            {"instruction": "When?", "input": "Rome", "context": "In 753.", "output": "753"},
            ["When?\n\nRome\n\nIn 753.", "753"],
        ),
        ({"question": "When?", "context": "In 753.", "answer": "753"}, ["When?\n\nIn 753.", "753"]),
        (
            {"question": "When?", "choices": ["753", "509"], "answer": "A"},
            ["When?\n\nA. 753\nB. 509", "A"],
        ),
        (
            {
                "question": "When?",
                "choices": {"text": ["753", "509"], "label": ["1", "2"]},
                "answerKey": "1",
            },
            ["When?\n\n1. 753\n2. 509", "1"],
        ),
        (
            {"instruction": "hi", "input": "there", "output": None, "response": "Ave"},
            ["hi\n\nthere", "Ave"],
        ),
        (
            {"messages": [HI, AVE], "system": " ", "history": [], "context": None, "images": []},
            ["hi", "Ave"],
        ),
        ({"messages": [HI, AVE], "history": "null", "input": float("nan")}, ["hi", "Ave"]),
    ],
)
def test_context_reaches_the_prompt(row: dict[str, Any], expected: list[str]) -> None:
    assert contents(row) == expected
    assert read(row).unused_columns == ()


def test_the_turns_in_history_are_context_and_not_learned() -> None:
    row = {"instruction": "Now", "output": "C", "history": [["Say hi", "Ave"]], "system": "S"}
    example = read(row)
    assert example.messages is not None
    assert [example.messages[n]["content"] for n in example.answers] == ["C"]
    assert example.n_prompt_messages == 4


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"system": "SPEAK LATIN", "prompt": "hi", "completion": " Ave"},
            "column system has no place in the format prompt and completion as plain text",
        ),
        ({"text": "t", "history": [["a", "b"]]}, "column history has no place in the format text"),
        ({"text": "t", "tools": [{"name": "f"}]}, "column tools has no place"),
        ({"messages": [HI, AVE], "context": "c"}, "column context has no place in the format mess"),
        ({"messages": [HI, AVE], "history": [["a", "b"]]}, "column history has no place"),
        ({"instruction": "q", "Input": "i", "output": "a"}, "'Input' has no known name.*'input'"),
        ({"messages": [LATIN, HI, AVE], "system": "S"}, "system differs from the conversation's"),
        (
            {"messages": [HI], "system": "S", "system_prompt": "T"},
            "system and system_prompt differ",
        ),
        ({"messages": [HI], "system": 3}, "system is a number"),
        ({"messages": [HI, AVE], "images": ["a.png"]}, "column images cannot be used"),
        ({"text": "<image> a cat", "image": "a.png"}, "column image cannot be used"),
        (
            {"instruction": "q", "output": "a", "history": [["x"]]},
            r"history\[0\] is a list: a pair",
        ),
        ({"instruction": "q", "output": "a", "history": 3}, "history is a number: a list of pairs"),
        ({"Instruction": "q", "Output": "a"}, "Did you mean 'instruction', 'output'?"),
        ({"Messages ": [HI]}, "Did you mean 'messages'?"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(row)


def test_other_columns_are_named() -> None:
    row = {"messages": [HI, AVE], "id": 3, "source": "x", "score": None, "note": "", "prompt": "hi"}
    assert read(row).unused_columns == ("id", "prompt", "source")


@pytest.mark.parametrize("choices", [[1, 2], {"text": ["a"], "label": []}, 3, ["a"] * 27])
def test_choices_that_are_no_texts_are_refused(choices: Any) -> None:
    with pytest.raises(DataError, match=r"choices is .*: a list of at most 26 texts is needed"):
        read({"question": "When?", "choices": choices, "answer": "A"})
