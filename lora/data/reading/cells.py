"""Values of a row's cells: JSON text and Python literals are read; only JSON's types are kept."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from typing import Any

from lora.errors import DataError

MAX_LITERAL_CHARACTERS = 1 << 20
"""Of a Python literal in a cell: Python's parser takes about a hundred times its size."""
_NO_VALUE = frozenset(("", "null", "none", "nan", "[]", "{}"))


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


def is_blank(value: object) -> bool:
    """Return whether a cell says nothing: null, NaN, white space, or an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, Mapping | list | tuple) and not value)


def is_no_list(value: object) -> bool:
    """Return whether a cell that could hold a list or an object has none: blank, or "null"."""
    if isinstance(value, str):
        return value.strip().lower() in _NO_VALUE
    return is_blank(value)


def from_json(value: object, name: str, *, always: bool = False) -> Any:
    """Return `value`, read as JSON if it is a string that begins like a list or an object.

    What is not JSON is read as a Python literal, which CSV files of Python's tables have. With
    `always` every string is read. Raises DataError for a string that is neither.
    """
    if not isinstance(value, str) or not (always or value.lstrip()[:1] in ("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        found = _read_literal(value)
        if found is None:
            raise DataError(f"{name} is a string that is not JSON: {error}") from None
        return found


def _read_literal(text: str) -> list[Any] | dict[Any, Any] | None:
    if len(text) > MAX_LITERAL_CHARACTERS:
        return None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list | dict) else None


def as_plain(value: Any, name: str) -> Any:
    """Return a copy of JSON types only: templates are untrusted code and get nothing else."""
    if isinstance(value, str):
        check_text(value, name)
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(
        value, dict | Mapping
    ):  # dict first: isinstance is fast for it and slow for Mapping
        return {_key(k, name): as_plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(v, name) for v in value]
    return f"<{type(value).__name__}>"  # a date, an image …: no template prints them


def _key(key: object, name: str) -> str:
    if not isinstance(key, str):
        raise DataError(f"{name} has the key {key!r}: a string is needed")
    check_text(key, name)
    return key
