from __future__ import annotations

from typing import Any

import pytest

from lora.data.reading.formats import Example, example_from_file, example_from_row
from lora.errors import DataError


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def read(row: Any) -> Example:
    return example_from_row(row, "f:1")


CHAT = (user("q"), assistant("a"))


@pytest.mark.parametrize(
    ("row", "format", "messages"),
    [
        ({"messages": list(CHAT)}, "messages", CHAT),
        ({"messages": list(CHAT), "prompt": "q", "text": "t"}, "messages", CHAT),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "conversations",
            CHAT,
        ),
        ({"conversations": list(CHAT)}, "conversations", CHAT),
        (
            {"conversations": list(CHAT), "system": "s"},
            "conversations",
            ({"role": "system", "content": "s"}, *CHAT),
        ),
        ({"instruction": "q", "output": "a"}, "instruction and output", CHAT),
        ({"instruction": "q", "input": "", "output": "a"}, "instruction and output", CHAT),
        ({"instruction": "q", "input": None, "output": "a", "text": "t"}, None, CHAT),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            "instruction and output",
            (user("q\n\ni"), assistant("a")),
        ),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},
            "instruction and output",
            (user("q\n\nc"), assistant("a")),
        ),
        ({"question": "q", "answer": "a", "id": 3}, "question and answer", CHAT),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, "prompt and completion", CHAT),
    ],
)
def test_conversations_are_found(row: dict[str, Any], format: str | None, messages: Any) -> None:
    example = read(row)
    assert example.messages == messages
    assert format is None or example.format == format
    assert example.source == "f:1"
    assert (example.prompt, example.completion, example.text) == (None, None, None)


def test_the_prompts_messages_are_counted() -> None:
    row = {"prompt": [user("q"), assistant("a"), user("r")], "completion": [assistant("b")]}
    assert read(row).n_prompt_messages == 3
    assert read({"messages": list(CHAT)}).n_prompt_messages == 0


def test_plain_strings_stay_plain() -> None:
    example = read({"prompt": "p", "completion": "c", "text": "t"})
    assert (example.prompt, example.completion, example.messages) == ("p", "c", None)
    example = read({"text": "t", "url": "u"})
    assert (example.format, example.text, example.is_file) == ("text", "t", False)
    assert example_from_file("t", "f").is_file


def test_values_that_are_null_do_not_hide_another_format() -> None:
    assert read({"messages": None, "text": "t"}).text == "t"


def test_json_texts_in_columns_are_read() -> None:
    row = {"messages": '[{"role": "user", "content": "[q]"}]', "tools": '[{"name": "f"}]'}
    example = read(row)
    assert example.messages == (user("[q]"),)
    assert example.tools == ({"name": "f"},)
    assert read({"messages": list(CHAT), "tools": []}).tools is None


def test_tool_calls_get_the_form_that_templates_expect() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    messages = [
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": None},
        {"role": "assistant", "content": "a", "tool_calls": None},
    ]
    found = read({"messages": messages}).messages
    assert found is not None
    assert found[1]["content"] == ""
    assert found[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": [1]}}
    assert found[2] == {"role": "tool", "content": "r", "tool_call_id": "1"}
    assert found[3] == assistant("a")
    assert call["function"] == {"name": "f", "arguments": '{"x": [1]}'}  # the row is unchanged


def test_sharegpt_calls_become_tool_calls() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "[r]"},
    ]
    found = read({"conversations": turns}).messages
    assert found is not None
    assert found[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert found[2] == {"role": "tool", "content": "[r]"}


def test_parts_of_text_are_joined_and_other_types_become_placeholders() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts, "at": object()}
    assert read({"messages": [message]}).messages == (
        {"role": "user", "content": "ab", "at": "<object>"},
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "a", "rejected": "b"}, "keys chosen, rejected fit no format. Allowed: mess"),
        ({}, "keys none fit no format"),
        ([1], "row is a list: an object"),
        ("x", "row is a string"),
        ({"Question": "q", "answer": "a"}, "Question, answer fit no.*Did you mean 'question'"),
        ({"messages": []}, "messages is empty"),
        ({"messages": {"role": "user"}}, "messages is an object: a list"),
        ({"messages": None}, "messages is null"),
        ({"messages": "[1"}, "messages is a string that is not JSON"),
        ({"messages": ["x"]}, r"messages\[0\] is a string: an object with role and content"),
        (
            {"messages": [{"role": "asistant", "content": "x"}]},
            r"\[0\] has the role 'asistant'. Allowed: system, .*Did you mean 'assistant'",
        ),
        ({"messages": [{"content": "x"}]}, "role None"),
        ({"messages": [{"role": ["x"], "content": "x"}]}, r"role \['x'\]"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is null: a string"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "part of type 'image': only text",
        ),
        ({"messages": [{"role": "user", "content": "\ud800x"}]}, "ud800.* not a Unicode character"),
        ({"messages": [{**assistant(""), "tool_calls": 3}]}, "tool_calls is a number"),
        (
            {"messages": [{**assistant(""), "tool_calls": [{}]}]},
            r"tool_calls\[0\] has no function name",
        ),
        (
            {"messages": [{**assistant(""), "tool_calls": [{"name": "f", "arguments": "x"}]}]},
            "arguments is a string that is not JSON",
        ),
        ({"messages": list(CHAT), "tools": 3}, "tools is a number: a list of objects"),
        ({"conversations": [{"from": "humen", "value": ""}]}, "'humen'.*Did you mean 'human'"),
        ({"conversations": [{"from": "gpt"}]}, "value is null"),
        ({"prompt": "p", "completion": 3}, "prompt is a string and completion a number"),
        ({"prompt": "p", "completion": [assistant("a")]}, "two strings or two lists"),
        ({"instruction": "q", "output": None}, "output is null: a string"),
        ({"instruction": 1, "output": "a"}, "instruction is a number"),
        ({"question": "q", "answer": 42}, "answer is a number"),
        (
            {"segments": [{"text": "a"}]},
            "segments is a list: a list of objects with text and",
        ),
        (
            {"segments": [{"text": "a", "label": True}, {"text": "b", "label": False}]},
            "context first .label false. and what is learned last",
        ),
        ({"prompt": "p", "completion": "c", "label": False}, "label is true or false.*preference"),
        ({"text": True}, "text is true or false"),
        ({"text": "a\udc80"}, "'.udc80' at character 1"),
    ],
)
def test_what_fits_no_format_is_refused(row: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(row)


def test_equal_content_has_an_equal_key() -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": ""}, {"messages": [*CHAT]}]
    keys = [read(row).content_key() for row in rows]
    assert len(set(keys)) == 4
    again = example_from_row({"text": "a", "id": 7}, "other:9")
    assert again.content_key() == keys[0]


@pytest.mark.parametrize(
    ("row", "is_empty"),
    [
        ({"prompt": "p", "completion": " \n"}, True),
        ({"prompt": "p", "completion": "c"}, False),
        ({"messages": [user("q"), assistant("")]}, True),
        ({"messages": [user(""), assistant("a")]}, False),
        ({"prompt": [user("q"), assistant("")], "completion": [assistant("a")]}, False),
        ({"messages": [{**assistant(""), "tool_calls": [{"name": "f"}]}]}, False),
        ({"text": " "}, False),
    ],
)
def test_empty_answers_are_found(row: Any, is_empty: bool) -> None:
    assert read(row).has_empty_answer is is_empty
