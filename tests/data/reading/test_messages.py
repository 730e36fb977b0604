"""Messages: other tools' names of speakers, tool calls in all their spellings."""

from __future__ import annotations

from typing import Any

import pytest

from lora.data.reading.messages import parse_messages
from lora.data.reading.tool_calls import parse_tools
from lora.errors import DataError

ASK = {"role": "user", "content": "time?"}


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "clock", "arguments": arguments}}


def parse(*messages: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return parse_messages(list(messages), "messages")


@pytest.mark.parametrize("arguments", ["", " ", "{}", {}, None, "null", "None"])
def test_empty_arguments_are_an_empty_object(arguments: Any) -> None:
    found = parse(ASK, {"role": "assistant", "content": "", "tool_calls": [call(arguments)]})
    assert found[1]["tool_calls"] == [call({})]


def test_arguments_may_be_a_python_literal() -> None:
    found = parse(ASK, {"role": "assistant", "tool_calls": [call("{'zone': 'utc', 'x': None}")]})
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"zone": "utc", "x": None}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"h": 12}, '{"h": 12}'),
        ([1, 2], "[1, 2]"),
        (12, "12"),
        (False, "false"),
        ({"é": [None]}, '{"é": [null]}'),
        ([{"type": "text", "text": "12:00"}], "12:00"),
        ([], ""),
    ],
)
@pytest.mark.parametrize(("role", "key"), [("role", "content"), ("from", "value")])
def test_a_tools_result_may_be_any_value(role: str, key: str, content: Any, text: str) -> None:
    assert parse({role: "tool", key: content})[0] == {"role": "tool", "content": text}


def test_the_legacy_function_call_is_read() -> None:
    legacy = {"name": "clock", "arguments": '{"zone": "utc"}'}
    found = parse(
        ASK,
        {"role": "assistant", "content": None, "function_call": legacy},
        {"role": "function", "name": "clock", "content": "12:00"},
    )
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": [call({"zone": "utc"})]}
    assert found[2] == {"role": "tool", "name": "clock", "content": "12:00"}
    assert parse({"role": "function", "content": "x"})[0]["role"] == "function"  # as before


@pytest.mark.parametrize("blank", [" ", "", "null", "None", "[]", [], None, {}, float("nan")])
def test_blank_tools_are_none(blank: Any) -> None:
    assert parse_tools({"tools": blank}) is None
    assert parse_tools({"functions": blank}) is None
    message = {"role": "assistant", "content": "a", "tool_calls": blank, "function_call": blank}
    assert parse(message) == ({"role": "assistant", "content": "a"},)


def test_legacy_functions_become_tools() -> None:
    assert parse_tools({"functions": [{"name": "f"}], "tools": None}) == (
        {"type": "function", "function": {"name": "f"}},
    )


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("Human", "user"),
        ("USER", "user"),
        ("prompter", "user"),
        ("model", "assistant"),
        ("bing", "assistant"),
        ("Bot", "assistant"),
        ("ai", "assistant"),
        ("ipython", "tool"),
        ("tool_response", "tool"),
        ("function", "function"),
        ("developer", "developer"),
    ],
)
def test_other_names_of_speakers_are_known(speaker: str, role: str) -> None:
    assert parse({"from": speaker, "value": "x"})[0] == {"role": role, "content": "x"}
    assert parse({"role": speaker, "content": "x"})[0] == {"role": role, "content": "x"}


def test_fields_beside_from_and_value_are_kept() -> None:
    row = {"from": "gpt", "value": "a", "thinking": "t", "tool_calls": [call("")]}
    found = parse(row)[0]
    assert found == {
        "role": "assistant",
        "content": "a",
        "thinking": "t",
        "tool_calls": [call({})],
    }


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "function_call": 3}, "function_call is a number: an object"),
        ({"role": "assistant", "function_call": "x"}, "function_call is a string that is not JSON"),
        (
            {"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [call("")]},
            "both tool_calls and function_call",
        ),
        ({"role": "tool", "content": None}, "content is null: a string"),
        ({"role": "tool", "content": [{"type": "image"}]}, "type 'image': only text"),
    ],
)
def test_calls_that_cannot_be_read_are_refused(message: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        parse(message)


def test_tools_and_functions_together_are_refused() -> None:
    with pytest.raises(DataError, match="both tools and functions"):
        parse_tools({"tools": [{"name": "f"}], "functions": [{"name": "g"}]})
