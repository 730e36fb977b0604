"""Dataclasses to JSON objects and back, with every fault of a file named. No torch.

A record is a dataclass whose fields are JSON values, records, lists, tuples or dicts of these.
Fields that are None are left out of the file unless they have `WRITES_NULL`; keys of a file that no
field has are ignored. NaN and infinity, which JSON does not have, are written as null; null is read
as NaN where a float is required.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, TypeVar, cast

RecordT = TypeVar("RecordT")
Faults = list[str]
"""What is wrong with files, each with the file's name; readers append to it and continue."""
Parser = Callable[[Any, str, Faults], Any]
"""(JSON value, its position, faults) -> the typed value, or `INVALID` after adding a fault."""
INVALID = object()
WRITES_NULL = {"writes_null": True}
"""Metadata of a field that is written as null, not left out, when it is None."""


def to_json(record: Any) -> dict[str, Any]:
    """Return a record's fields as JSON values, without those that are None."""
    return {
        name: _plain(value)
        for name, writes_null in _written_fields(cast(Hashable, type(record)))
        if (value := getattr(record, name)) is not None or writes_null
    }


def json_text(value: Any, **options: Any) -> str:
    """Return `value` as JSON text; NaN and infinity are null. `options` are those of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # rare, so that rows of finite numbers are not walked twice
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


@functools.cache
def _written_fields(kind: Any) -> tuple[tuple[str, bool], ...]:
    """Return each field's name, and whether it is written as null. Cached: rows come every step."""
    return tuple((f.name, "writes_null" in f.metadata) for f in dataclasses.fields(kind))


def parse(kind: type[RecordT], value: object, where: str, faults: Faults) -> RecordT | None:
    """Return the record of this kind that a JSON value holds, and add what is wrong to `faults`.

    A field that is absent, null or wrong gets its default; without a default, None where its type
    allows that. Returns None if `value` is not an object, or a field that needs a value has none.
    """
    if not isinstance(value, Mapping):
        faults.append(f"{where} holds {value!r:.40}, not an object")
        return None
    found: dict[str, Any] = {}
    is_whole = True
    for name, (parser, is_required, may_be_none) in _parsers(cast(Hashable, kind)).items():
        given = value.get(name)
        if given is None:
            if is_required and may_be_none:
                found[name] = None
            elif name in value and parser is _parse_float and is_required:
                found[name] = math.nan
            elif is_required:
                faults.append(f"{where}: {name} is missing")
        elif (parsed := parser(given, f"{where}: {name}", faults)) is not INVALID:
            found[name] = parsed
        is_whole &= name in found or not is_required
    try:
        return kind(**found) if is_whole else None
    except ValueError as error:  # a record that checks more than its types
        faults.append(f"{where}: {error}")
        return None


def _plain(value: Any) -> Any:
    if type(value) in (float, int, str):  # most of them: what follows takes a microsecond each
        return value
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


@functools.cache
def _parsers(kind: Any) -> dict[str, tuple[Parser, bool, bool]]:
    """Return by field name what reads it, whether it has no default, and whether it may be None."""
    hints = typing.get_type_hints(kind)
    missing = dataclasses.MISSING
    return {
        field.name: (
            _parser_of(hints[field.name]),
            field.default is missing and field.default_factory is missing,
            types.NoneType in typing.get_args(hints[field.name]),
        )
        for field in dataclasses.fields(kind)
    }


def _parser_of(hint: Any) -> Parser:
    """Return what reads a value of this type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (hint,) = (one for one in arguments if one is not types.NoneType)
        return _parser_of(hint)
    if dataclasses.is_dataclass(hint):
        return functools.partial(_parse_record, cast(type, hint))
    if origin is Literal:
        return functools.partial(_parse_choice, arguments)
    if origin in (tuple, list):
        return functools.partial(_parse_list, origin, _parser_of(arguments[0]))
    if origin is dict:
        return functools.partial(_parse_dict, _parser_of(arguments[1]))
    return {int: _parse_int, float: _parse_float, str: _parse_str, bool: _parse_bool}.get(
        hint, _parse_any
    )


def _parse_record(kind: type, value: Any, where: str, faults: Faults) -> Any:
    parsed = parse(kind, value, where, faults)
    return INVALID if parsed is None else parsed


def _parse_choice(allowed: tuple[str, ...], value: Any, where: str, faults: Faults) -> Any:
    is_known = isinstance(value, str) and value in allowed
    return value if is_known else _fault(where, value, f"one of {', '.join(allowed)}", faults)


def _parse_list(kind: type, of: Parser, value: Any, where: str, faults: Faults) -> Any:
    if not isinstance(value, list):
        return _fault(where, value, "a list", faults)
    items = [of(item, f"{where}, number {n}", faults) for n, item in enumerate(value, start=1)]
    return INVALID if any(item is INVALID for item in items) else kind(items)


def _parse_dict(of: Parser, value: Any, where: str, faults: Faults) -> Any:
    if not isinstance(value, dict):
        return _fault(where, value, "an object", faults)
    items = {key: of(item, f"{where}: {key}", faults) for key, item in value.items()}
    return INVALID if any(item is INVALID for item in items.values()) else items


def _parse_int(value: Any, where: str, faults: Faults) -> Any:
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole:
        return _fault(where, value, "a whole number", faults)
    return int(value)


def _parse_float(value: Any, where: str, faults: Faults) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _fault(where, value, "a number", faults)
    try:
        return float(value)
    except OverflowError:  # JSON's integers have no bound
        return _fault(where, value, "a number of a float's range", faults)


def _parse_str(value: Any, where: str, faults: Faults) -> Any:
    return value if isinstance(value, str) else _fault(where, value, "a string", faults)


def _parse_bool(value: Any, where: str, faults: Faults) -> Any:
    return value if isinstance(value, bool) else _fault(where, value, "true or false", faults)


def _parse_any(value: Any, where: str, faults: Faults) -> Any:
    return value


def _fault(where: str, value: Any, wanted: str, faults: Faults) -> Any:
    faults.append(f"{where} is {value!r:.40}, not {wanted}")
    return INVALID
