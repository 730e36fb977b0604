"""Messages of a conversation, in the form that chat templates expect.

A message is a dict with `role` and `content` (a string) and any further fields of the row:
`tool_calls`, `name`, `tool_call_id`, `reasoning_content` … ShareGPT's `from` and `value` are read
as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora.errors import DataError, did_you_mean

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Allowed roles of a message."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def parse_messages(value: object, name: str) -> tuple[Message, ...]:
    """Return the messages of the column `name`; a string is read as JSON first.

    Null fields are dropped (tables use them for missing values), content parts of type text are
    joined, and a tool call's arguments given as JSON text become the object that templates expect.
    Raises DataError for anything that is not a conversation.
    """
    value = _from_json(value, name)
    if not isinstance(value, list | tuple):
        raise DataError(f"{name} is {kind_of(value)}: a list of messages is needed")
    if not value:
        raise DataError(f"{name} is empty: at least one message is needed")
    return tuple(_parse_message(item, f"{name}[{i}]") for i, item in enumerate(value))


def parse_objects(value: object, name: str) -> tuple[dict[str, Any], ...] | None:
    """Return a column such as `tools`, a list of objects or its JSON text; None if it is empty.

    Raises DataError for anything else.
    """
    value = _from_json(value, name)
    if not value:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(v, Mapping) for v in value):
        raise DataError(f"{name} is {kind_of(value)}: a list of objects is needed")
    return tuple(_plain(item, name) for item in value)


def check_text(value: str, name: str) -> None:
    """Raise DataError if `value` has a lone surrogate, which is not a character."""
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} has {value[error.start]!r} at character {error.start}, which is not a Unicode "
            "character: correct the text's encoding"
        ) from None


def kind_of(value: object) -> str:
    """Return a value's type in JSON's terms, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else type(value).__name__


def _parse_message(item: object, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{name} is {kind_of(item)}: an object with role and content is needed")
    if "role" not in item and "from" in item:
        return _parse_sharegpt(item, name)
    role = item.get("role")
    if role not in ROLES:
        near = did_you_mean(str(role), ROLES)
        raise DataError(f"{name} has the role {role!r}. Allowed: {', '.join(ROLES)}.{near}")
    message = _plain({k: v for k, v in item.items() if v is not None}, name)
    if "tool_calls" in message:
        message["tool_calls"] = _parse_tool_calls(message["tool_calls"], name)
        if not message["tool_calls"]:
            del message["tool_calls"]
    message["content"] = _content(message, name)
    return message


def _parse_sharegpt(item: Mapping[str, Any], name: str) -> Message:
    speaker, value = item["from"], item.get("value")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        near = did_you_mean(str(speaker), _SHAREGPT_ROLES)
        allowed = ", ".join(_SHAREGPT_ROLES)
        raise DataError(f"{name} is from {speaker!r}. Allowed: {allowed}.{near}")
    if not isinstance(value, str):
        raise DataError(f"{name}.value is {kind_of(value)}: a string is needed")
    if speaker == "function_call":
        call = _from_json(value, f"{name}.value", always=True)
        calls = _parse_tool_calls(call if isinstance(call, list) else [call], name)
        return {"role": role, "content": "", "tool_calls": calls}
    check_text(value, f"{name}.value")
    return {"role": role, "content": value}


def _content(message: Message, name: str) -> str:
    content = message.get("content")
    if content is None and "tool_calls" in message:
        return ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content") for part in content)
    if not isinstance(content, str):
        raise DataError(f"{name}.content is {kind_of(content)}: a string is needed")
    return content


def _part(part: object, name: str) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
    raise DataError(f"{name} has a part of type {kind!r}: only text is supported")


def _parse_tool_calls(value: object, name: str) -> list[Message]:
    calls = _from_json(value, f"{name}.tool_calls")
    if not isinstance(calls, list):
        raise DataError(f"{name}.tool_calls is {kind_of(calls)}: a list is needed")
    return [_parse_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _parse_call(call: object, name: str) -> Message:
    if not isinstance(call, Mapping):
        raise DataError(f"{name} is {kind_of(call)}: an object is needed")
    plain: Message = _plain({k: v for k, v in call.items() if v is not None}, name)
    function = plain.get("function", plain)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{name} has no function name: name and arguments are needed")
    if isinstance(function.get("arguments"), str):
        function["arguments"] = _from_json(function["arguments"], f"{name}.arguments", always=True)
    return plain if "function" in plain else {"type": "function", "function": plain}


def _from_json(value: object, name: str, *, always: bool = False) -> Any:
    """Return `value`, read as JSON if it is a string that begins like a list or an object."""
    if not isinstance(value, str) or not (always or value.lstrip()[:1] in ("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is a string that is not JSON: {error}") from None


def _plain(value: Any, name: str) -> Any:
    """Return a copy of JSON types only: templates are untrusted code and get nothing else."""
    if isinstance(value, str):
        check_text(value, name)
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(
        value, dict | Mapping
    ):  # dict first: isinstance is fast for it and slow for Mapping
        return {_key(k, name): _plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, name) for v in value]
    return f"<{type(value).__name__}>"  # a date, an image …: no template prints them


def _key(key: object, name: str) -> str:
    if not isinstance(key, str):
        raise DataError(f"{name} has the key {key!r}: a string is needed")
    check_text(key, name)
    return key
