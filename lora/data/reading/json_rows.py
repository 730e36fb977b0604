"""Rows of JSON Lines and JSON files, each with its file and line, read a piece at a time."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora.data.reading.faults import (
    BOM,
    MAX_EXAMPLE_CHARACTERS,
    Faults,
    bounded_lines,
    open_text,
    too_large,
    undecoded,
)

Rows = Iterator[tuple[str, object]]
"""The row's location, such as "file:line", and its value."""

_PIECE_CHARACTERS = 1 << 18
_SPACES = re.compile(r"[ \t\n\r]*")
_WRAPPERS = ("data", "train", "rows", "examples")  # keys under which exports put their one list
_WRAPPED = re.compile(rf'\s*\{{\s*"({"|".join(_WRAPPERS)})"\s*:\s*(?=\[)')
_MAX_UNFINISHED = 12  # characters at the end of a piece that may be half a word or an escape


class _Decoder:
    """JSON's values, with the keys that an object has more than once."""

    def __init__(self) -> None:
        self._twice: dict[str, None] = {}
        self._json = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            self._twice |= dict.fromkeys(key for key in keys if keys.count(key) > 1)
        return found

    def decode(self, text: str) -> Any:
        """Return the one value in `text`. Raises ValueError if it has none, or more."""
        self._twice.clear()
        return self._json.decode(text)

    def raw_decode(self, text: str, offset: int) -> tuple[Any, int]:
        """Return the value at `offset`, and where it ends."""
        self._twice.clear()
        return self._json.raw_decode(text, offset)

    @property
    def fault(self) -> str | None:
        """What is wrong with the last value: only one of two values could be used."""
        names = ", ".join(map(repr, self._twice))
        return f"an object has the key {names} more than once: keep one" if names else None


def read_json_lines(path: Path, faults: Faults) -> Rows:
    """Yield the rows of a JSON Lines file; reading continues after a damaged line."""
    decoder = _Decoder()
    with open_text(path) as file:
        for number, line in enumerate(bounded_lines(file), 1):
            where = f"{path}:{number}"
            wrong = too_large() if line is None else _first(undecoded(line))
            text = "" if wrong else (line or "").lstrip(BOM).strip()
            try:
                row = decoder.decode(text) if text else None
                wrong = wrong or (decoder.fault if text else None)
            except (ValueError, RecursionError) as error:
                wrong = _not_json(error)
            if wrong:
                faults.add(where, wrong)
            elif text:
                yield where, row
            if faults.are_too_many:
                return


def _first(found: tuple[int, str] | None) -> str | None:
    return None if found is None else found[1]


def _not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.colno}"
    return f"not JSON: {error}"


def read_json(path: Path, faults: Faults) -> Rows:
    """Yield the rows of a list, of the one list in an object, or of JSON Lines named .json."""
    if _begins_with_a_row(path):
        yield from read_json_lines(path, faults)
        return
    with open_text(path) as file:
        window = _Window(file)
        try:
            yield from _items(window, path, faults)
        except (ValueError, RecursionError) as error:
            faults.add(f"{path}:{window.line_of(error)}", window.describe(error))


def _begins_with_a_row(path: Path) -> bool:
    """Return whether the first line is a whole object and other lines follow."""
    with open_text(path) as file:
        lines = (line for line in bounded_lines(file) if line is None or line.lstrip(BOM).strip())
        first = next(lines, None)
        if first is None or not first.lstrip(BOM).lstrip().startswith("{"):
            return False
        if next(lines, "") == "":
            return False
    try:
        row = json.loads(first.lstrip(BOM))
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and _only_list(row) is None


def _only_list(value: Mapping[str, Any]) -> str | None:
    """Return the key of the one list that an object wraps, as exports do."""
    names = [key for key in _WRAPPERS if isinstance(value.get(key), list)]
    return names[0] if len(names) == 1 else None


class _Refused(ValueError):
    """A fault that is none of JSON's grammar."""


class _Window:
    """The part of a JSON file in memory: from the row that is being read on."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self.text, self.offset = "", 0
        self.decoder = _Decoder()
        self._file, self._is_whole = file, False
        self._lines, self._column = 0, 0  # before the window

    def begin(self) -> None:
        """Read the first piece, and skip byte order marks."""
        self._extend()
        self.offset = len(self.text) - len(self.text.lstrip(BOM))

    def _extend(self) -> bool:
        """Read more, as much again as there is; False at the end of the file."""
        self._forget()
        more = self._file.read(max(_PIECE_CHARACTERS, len(self.text)))
        self._is_whole = not more
        wrong = undecoded(more)
        if wrong is not None:
            self.text, self.offset = self.text + more, len(self.text) + wrong[0]
            raise _Refused(wrong[1])
        self.text += more
        return bool(more)

    def _forget(self) -> None:
        """Drop what is before the offset."""
        self._lines += self.text.count("\n", 0, self.offset)
        last = self.text.rfind("\n", 0, self.offset)
        self._column = self.offset - last - 1 if last >= 0 else self._column + self.offset
        self.text, self.offset = self.text[self.offset :], 0

    @property
    def line(self) -> int:
        """The line at the offset, from 1."""
        return self._lines + self.text.count("\n", 0, self.offset) + 1

    def line_of(self, error: ValueError | RecursionError) -> int:
        """Return the line of the file at which an error of the decoder stands."""
        position = error.pos if isinstance(error, json.JSONDecodeError) else self.offset
        return self._lines + self.text.count("\n", 0, position) + 1

    def describe(self, error: ValueError | RecursionError) -> str:
        """Return the fault in words, with the character of the file's line."""
        if isinstance(error, _Refused):
            return str(error)
        if isinstance(error, json.JSONDecodeError):
            last = self.text.rfind("\n", 0, error.pos)
            column = error.pos - last if last >= 0 else self._column + error.pos + 1
            return f"not JSON: {error.msg} at character {column}"
        return f"not JSON: {error}"

    def next_character(self) -> str:
        """Skip white space, and return what stands there; "" at the end of the file."""
        while True:
            found = _SPACES.match(self.text, self.offset)
            self.offset = found.end() if found else self.offset
            if self.offset < len(self.text) or not self._extend():
                return self.text[self.offset : self.offset + 1]

    def wrapper(self) -> str | None:
        """Return the key of the list that the file's object begins with, and skip to the list."""
        found = _WRAPPED.match(self.text, self.offset)
        self.offset = found.end() if found else self.offset
        return found[1] if found else None

    def value(self) -> Any:
        """Return the value at the offset, and skip it.

        Raises ValueError if it is not JSON, or larger than an example may be.
        """
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.offset)
                # A number at the end of the window may go on after it.
                is_cut = not self._is_whole and end == len(self.text)
            except json.JSONDecodeError as error:
                if self._is_whole or not self._may_be_cut(error):
                    raise
                value, end, is_cut = None, len(self.text), True
            if end - self.offset > MAX_EXAMPLE_CHARACTERS:
                raise _Refused(too_large())
            if not is_cut:
                self.offset = end
                return value
            self._extend()

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        is_string = error.msg.startswith("Unterminated string")
        return is_string or error.pos >= len(self.text) - _MAX_UNFINISHED

    def fail(self, what: str) -> json.JSONDecodeError:
        """Return the error to raise for what stands at the offset."""
        return json.JSONDecodeError(what, self.text, self.offset)


def _items(window: _Window, path: Path, faults: Faults) -> Rows:
    """Yield a list's items with their lines, or the single value in the file."""
    window.begin()
    window.next_character()
    wrapper = window.wrapper()
    if window.next_character() != "[":
        yield from _whole(window, path, faults)
        return
    window.offset += 1
    while window.next_character() != "]":
        where = f"{path}:{window.line}"
        value = window.value()
        if window.decoder.fault:
            faults.add(where, window.decoder.fault)
        else:
            yield where, value
        if faults.are_too_many:
            return
        del value  # the next one is parsed without it
        if window.next_character() == ",":
            window.offset += 1
        elif window.next_character() != "]":
            raise window.fail("a comma or the end of the list is missing")
    window.offset += 1
    if wrapper:
        _check_rest(window, wrapper)
    elif window.next_character():
        raise window.fail("there is more text after the end of the list")


def _whole(window: _Window, path: Path, faults: Faults) -> Rows:
    """Yield the one value of a file, or the rows of the one list in it."""
    value = window.value()
    if window.decoder.fault:
        faults.add(f"{path}:1", window.decoder.fault)
        return
    if window.next_character():
        raise window.fail("Extra data")
    key = _only_list(value) if isinstance(value, dict) else None
    yield from ((f"{path}:1", item) for item in ([value] if key is None else value[key]))


def _check_rest(window: _Window, wrapper: str) -> None:
    """Raise for the fields of an object after its first, its rows, if one could be rows too."""
    while window.next_character() != "}":
        if window.next_character() != ",":
            raise window.fail("Expecting ',' delimiter")
        window.offset += 1
        window.next_character()
        key = window.value()
        if not isinstance(key, str):
            raise window.fail("Expecting property name enclosed in double quotes")
        if window.next_character() != ":":
            raise window.fail("Expecting ':' delimiter")
        window.offset += 1
        window.next_character()
        value = window.value()
        if key == wrapper:
            raise _Refused(f"the object has the key {key!r} more than once: keep one")
        if key in _WRAPPERS and isinstance(value, list):
            what = f"the object has two lists of rows, {wrapper} and {key}: keep one"
            raise _Refused(what)
    window.offset += 1
    if window.next_character():
        raise window.fail("Extra data")
