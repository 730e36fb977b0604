"""Tool calls and tool definitions, in the form that chat templates expect.

OpenAI's legacy form is read as well: `function_call` of a message and the column `functions`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora.data.reading.cells import as_plain, from_json, is_no_list, kind_of
from lora.errors import DataError

_PART_TYPES = ("text", "image", "image_url", "audio", "input_audio", "video", "file")
"""Types of content parts; of them only text is supported."""


def parse_objects(value: object, name: str) -> tuple[dict[str, Any], ...] | None:
    """Return a column such as `documents`, a list of objects or its JSON text; None if it is empty.

    Raises DataError for anything else.
    """
    if is_no_list(value):
        return None
    value = from_json(value, name)
    if not isinstance(value, list | tuple) or not all(isinstance(v, Mapping) for v in value):
        raise DataError(f"{name} is {kind_of(value)}: a list of objects is needed")
    return tuple(as_plain(item, name) for item in value)


def parse_tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """Return the tools of a row: its column `tools`, or the legacy `functions`; None without."""
    tools = parse_objects(row.get("tools"), "tools")
    functions = parse_objects(row.get("functions"), "functions")
    if tools is None and functions is not None:
        return tuple({"type": "function", "function": function} for function in functions)
    if tools is not None and functions is not None:
        raise DataError("the row has both tools and functions: keep one of them")
    return tools


def take_tool_calls(message: dict[str, Any], name: str) -> None:
    """Changes `message` in place: its tool calls get the form that templates expect.

    A legacy `function_call` becomes `tool_calls`; an empty list goes.
    """
    legacy = message.pop("function_call", None)
    calls = message.pop("tool_calls", None)
    found = [] if is_no_list(calls) else parse_calls(calls, f"{name}.tool_calls")
    if not is_no_list(legacy):
        if found:
            raise DataError(f"{name} has both tool_calls and function_call: keep one of them")
        call = from_json(legacy, f"{name}.function_call", always=True)
        found = [_parse_call(call, f"{name}.function_call")]
    if found:
        message["tool_calls"] = found


def parse_calls(value: object, name: str) -> list[dict[str, Any]]:
    """Return a list of tool calls; JSON text becomes the objects that it holds.

    Raises DataError for a call without a name, or with arguments that are not JSON.
    """
    calls = from_json(value, name)
    if not isinstance(calls, list | tuple):
        raise DataError(f"{name} is {kind_of(calls)}: a list is needed")
    return [_parse_call(call, f"{name}[{i}]") for i, call in enumerate(calls)]


def tool_result(content: object) -> object:
    """Return a tool's result: objects, numbers and lists as JSON text, but for content parts."""
    if isinstance(content, str) or content is None or _are_parts(content):
        return content
    return json.dumps(content, ensure_ascii=False)


def _are_parts(content: object) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in _PART_TYPES for part in content
    )


def _parse_call(call: object, name: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise DataError(f"{name} is {kind_of(call)}: an object is needed")
    plain: dict[str, Any] = as_plain({k: v for k, v in call.items() if v is not None}, name)
    function = plain.get("function", plain)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{name} has no function name: name and arguments are needed")
    arguments = function.get("arguments")
    if is_no_list(arguments):  # a call without arguments, which some servers write as ""
        function["arguments"] = {}
    elif isinstance(arguments, str):
        function["arguments"] = from_json(arguments, f"{name}.arguments", always=True)
    return plain if "function" in plain else {"type": "function", "function": plain}
