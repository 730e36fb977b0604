"""Messages of a conversation, in the form that chat templates expect.

A message is a dict with `role` and `content` (a string) and any further fields of the row:
`tool_calls`, `name`, `tool_call_id`, `reasoning_content` … ShareGPT's `from` and `value` are read
as well, with the names that its users give to speakers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora.data.reading.cells import as_plain, check_text, from_json, kind_of
from lora.data.reading.tool_calls import parse_calls, take_tool_calls, tool_result
from lora.errors import DataError, did_you_mean

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Allowed roles of a message."""

_CALLERS = frozenset(("function_call", "tool_call"))
_SPEAKERS = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(
        ("gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai"), "assistant"
    ),
    **dict.fromkeys(("observation", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(_CALLERS, "assistant"),
}
"""Role by the name that data sets give to a speaker; upper and lower case are the same."""


def parse_messages(value: object, name: str) -> tuple[Message, ...]:
    """Return the messages of the column `name`; a string is read as JSON first.

    Null fields are dropped (tables use them for missing values), content parts of type text are
    joined, and a tool call's arguments given as JSON text become the object that templates expect.
    Raises DataError for anything that is not a conversation.
    """
    value = from_json(value, name)
    if not isinstance(value, list | tuple):
        raise DataError(f"{name} is {kind_of(value)}: a list of messages is needed")
    if not value:
        raise DataError(f"{name} is empty: at least one message is needed")
    messages = tuple(_parse_message(item, f"{name}[{i}]") for i, item in enumerate(value))
    if any(isinstance(item, Mapping) and item.get("function_call") for item in value):
        for message in messages:  # the results of legacy calls
            message["role"] = "tool" if message["role"] == "function" else message["role"]
    return messages


def _parse_message(item: object, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{name} is {kind_of(item)}: an object with role and content is needed")
    is_sharegpt = "role" not in item and "from" in item
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    speaker = item.get(role_key)
    role = _find_role(speaker, name, is_sharegpt)
    message: Message = as_plain({k: v for k, v in item.items() if v is not None}, name)
    content = message.get(content_key)
    if is_sharegpt:
        others = {k: v for k, v in message.items() if k not in (role_key, content_key)}
        message = {"role": role, "content": content, **others}
    if speaker in _CALLERS:
        call = from_json(content, f"{name}.{content_key}", always=True)
        message["tool_calls"] = parse_calls(call if isinstance(call, list) else [call], name)
        content = None
    take_tool_calls(message, name)
    if role in ("tool", "function"):
        content = tool_result(content)
    message["role"] = role
    message["content"] = _content(
        content, f"{name}.{content_key}", has_calls="tool_calls" in message
    )
    return message


def _find_role(speaker: object, name: str, is_sharegpt: bool) -> str:
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        allowed = _SPEAKERS if is_sharegpt else ROLES
        is_named = f"is from {speaker!r}" if is_sharegpt else f"has the role {speaker!r}"
        near = did_you_mean(str(speaker), allowed)
        raise DataError(f"{name} {is_named}. Allowed: {', '.join(allowed)}.{near}")
    return role


def _content(content: object, name: str, *, has_calls: bool) -> str:
    if content is None and has_calls:
        return ""
    if isinstance(content, list):
        content = "".join(_part(part, name) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{name} is {kind_of(content)}: a string is needed")
    check_text(content, name)
    return content


def _part(part: object, name: str) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
    raise DataError(f"{name} has a part of type {kind!r}: only text is supported")
