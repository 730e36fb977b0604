"""Rows of JSON Lines, JSON, CSV and Parquet files, each with its file and line.

A damaged row is recorded as a fault, and reading continues after it where the format allows.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora.errors import DataError, DependencyError, gather

Rows = Iterator[tuple[str, object]]
"""The row's location, such as "file:line", and its value."""

_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
_MAX_FAULTS = 1000  # distinct ones; after that the rest of the data is not read
_MAX_FIELD_CHARACTERS = 1 << 30
_SPACES = re.compile(r"[ \t\n\r]*")
_WRAPPERS = ("data", "train", "rows", "examples")  # keys under which exports put their one list
_WRAPPED = re.compile(rf'\s*\{{\s*"({"|".join(_WRAPPERS)})"\s*:\s*(?=\[)')


class Faults:
    """Gathers faults and where they are; the same fault of many rows is reported once."""

    def __init__(self) -> None:
        self._locations: dict[str, list[str]] = {}

    def add(self, where: str, what: object) -> None:
        self._locations.setdefault(str(what), []).append(where)

    @property
    def are_too_many(self) -> bool:
        return len(self._locations) >= _MAX_FAULTS

    def raise_if_any(self, heading: str, advice: str) -> None:
        if not self._locations:
            return
        faults = [f"{_list_locations(where)}: {what}" for what, where in self._locations.items()]
        raise DataError(gather(faults, heading, advice))


def _list_locations(where: list[str]) -> str:
    return where[0] if len(where) == 1 else f"{where[0]} and {len(where) - 1} more"


def decode_file(path: Path, faults: Faults) -> str | None:
    """Return a file's text with line ends as \\n and without leading byte order marks."""
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        faults.add(f"{path}:{line}", _not_utf8(data, error))
        return None
    return text.lstrip(_BOM).replace("\r\n", "\n").replace("\r", "\n")


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    advice = "it looks like UTF-16: save it as UTF-8" if utf16 else "save the file as UTF-8"
    return f"byte {data[error.start]:#04x} is not UTF-8 ({error.reason}); {advice}"


def _read_json_lines(path: Path, faults: Faults) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode().lstrip(_BOM).strip()
                if text:
                    yield f"{path}:{number}", json.loads(text)
            except UnicodeDecodeError as error:
                faults.add(f"{path}:{number}", _not_utf8(line, error))
            except (ValueError, RecursionError) as error:
                faults.add(f"{path}:{number}", _not_json(error))
            if faults.are_too_many:
                return


def _not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.colno}"
    return f"not JSON: {error}"


def _read_json(path: Path, faults: Faults) -> Rows:
    """Yield the rows of a list, of the one list in an object, or of JSON Lines named .json."""
    if _begins_with_a_row(path):
        yield from _read_json_lines(path, faults)
        return
    text = decode_file(path, faults)
    if text is None:
        return
    try:
        yield from _items(text, path, faults)
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, error.pos) + 1 if isinstance(error, json.JSONDecodeError) else 1
        faults.add(f"{path}:{line}", _not_json(error))


def _begins_with_a_row(path: Path) -> bool:
    """Return whether the first line is a whole object and other lines follow."""
    with path.open("rb") as file:
        if file.read(64).lstrip(_BOM.encode() + b" \t\r\n")[:1] != b"{":
            return False
        file.seek(0)
        first, second = file.readline(), file.readline(64)
    try:
        row = json.loads(first.decode().lstrip(_BOM)) if second else None
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and _only_list(row) is None


def _only_list(value: Mapping[str, Any]) -> str | None:
    """Return the key of the one list that an object wraps, as exports do."""
    names = [key for key in _WRAPPERS if isinstance(value.get(key), list)]
    return names[0] if len(names) == 1 else None


def _items(text: str, path: Path, faults: Faults) -> Rows:
    """Yield a list's items with their lines, or the single value in `text`."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    wrapped = _WRAPPED.match(text)
    start = wrapped.end() if wrapped else _skip_spaces(text, 0)
    if not text.startswith("[", start):
        whole = decoder.decode(text[start:])
        key = _only_list(whole) if isinstance(whole, dict) else None
        yield from ((f"{path}:1", item) for item in ([whole] if key is None else whole[key]))
        return
    offset = _skip_spaces(text, start + 1)
    while not text.startswith("]", offset):
        line += text.count("\n", counted, offset)
        counted = offset
        value, offset = decoder.raw_decode(text, offset)
        yield f"{path}:{line}", value
        offset = _skip_spaces(text, offset)
        if text.startswith(",", offset):
            offset = _skip_spaces(text, offset + 1)
        elif not text.startswith("]", offset):
            raise json.JSONDecodeError("a comma or the end of the list is missing", text, offset)
    if wrapped:
        others = _only_list(_read_rest(text, offset + 1))
        if others is not None:
            what = f"the object has two lists of rows, {wrapped[1]} and {others}: keep one"
            faults.add(f"{path}:1", what)
    elif text[offset + 1 :].strip():
        raise json.JSONDecodeError("there is more text after the end of the list", text, offset + 1)


def _read_rest(text: str, offset: int) -> dict[str, Any]:
    """Return the fields of an object after its first, which ends at `offset`."""
    first = '{"": 0'
    try:
        rest: dict[str, Any] = json.loads(first + text[offset:])
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(error.msg, text, offset + error.pos - len(first)) from None
    return rest


def _skip_spaces(text: str, offset: int) -> int:
    found = _SPACES.match(text, offset)
    return found.end() if found else offset


def _read_csv(path: Path, faults: Faults) -> Rows:
    former = csv.field_size_limit(_MAX_FIELD_CHARACTERS)  # global in the process; restored below
    try:
        # Bytes that are not UTF-8 become surrogates, which are refused in every row.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _csv_rows(path, file, faults)
    finally:
        csv.field_size_limit(former)


def _csv_rows(path: Path, file: Iterable[str], faults: Faults) -> Rows:
    lines = iter(file)
    header = next(lines, "")
    # With equal counts (as in a header of one name: none at all) the first delimiter wins.
    delimiter = max("\t,;" if path.suffix.lower() == ".tsv" else ",;\t", key=header.count)
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    number = 1
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            faults.add(f"{path}:{number}", f"not CSV: {error}")
            return
        where, number = f"{path}:{number}", reader.line_num + 1
        if not names:
            names = [name.strip().lstrip(_BOM) for name in values]
            if not _is_header(names, where, faults):
                return
        elif len(values) == len(names):
            yield where, dict(zip(names, values, strict=True))
        elif values:
            faults.add(where, f"{len(values)} fields, but the header names {len(names)}")


def _is_header(names: list[str], where: str, faults: Faults) -> bool:
    data = ",".join(names).encode(errors="surrogateescape")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        faults.add(where, _not_utf8(data, error))
        return False
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        faults.add(where, f"the header names {', '.join(map(repr, twice))} more than once")
    return not twice


def _read_parquet(path: Path, faults: Faults) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DependencyError(
            f"Cannot read {path}: pyarrow is not installed. Run: pip install 'lora-lm[data]'"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for part in file.iter_batches(batch_size=1024):
                for row in part.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        faults.add(f"{path}:row {number + 1}", f"cannot read as Parquet: {error}")


def without_nulls(value: Any) -> Any:
    """Return `value` without nulls inside its columns, which tables use to fill up objects."""
    if isinstance(value, Mapping):
        return {k: _drop_nulls(v) for k, v in value.items()}
    return value


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _drop_nulls(v) for k, v in value.items() if v is not None}
    return [_drop_nulls(v) for v in value] if isinstance(value, list | tuple) else value


TABLE_READERS: dict[str, Callable[[Path, Faults], Rows]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
