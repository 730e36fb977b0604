"""Templates of rows: `{text}\\nLabel: {label}` makes a prompt and a completion of a row's columns.

    {name}      the column of that name; {{ and }} are braces
    [[ … ]]     what is learned, up to the end; without it that begins with the last column
    \\n \\t       a line end and a tab, as shells pass them

White space before what is learned belongs to it: a prompt ends as it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora.data.reading.cells import check_text, is_blank, kind_of
from lora.errors import ConfigError, DataError, did_you_mean

Piece = tuple[bool, str]
"""Whether it is a column, and its name; else a text as it is."""
_MARK = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|\[\[|\]\]")
_EXAMPLE = "Try '{text}\\nLabel: {label}', or mark it: '{text}\\nLabel: [[{label}]]'."


@dataclass(frozen=True)
class RowTemplate:
    """A template, taken apart."""

    source: str
    """With line ends and tabs instead of their escapes."""
    prompt: tuple[Piece, ...]
    completion: tuple[Piece, ...]
    """What is learned."""

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """Names of the columns in the prompt, each once."""
        return tuple(dict.fromkeys(text for is_column, text in self.prompt if is_column))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, each once."""
        names = [text for is_column, text in (*self.prompt, *self.completion) if is_column]
        return tuple(dict.fromkeys(names))

    def fill(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Return the prompt and the completion of a row.

        Raises DataError if it lacks a column, or all columns of the completion are empty.
        """
        learned = [name for is_column, name in self.completion if is_column]
        prompt, completion = _fill(self.prompt, row), _fill(self.completion, row)
        if learned and all(is_blank(row[name]) for name in learned):
            raise DataError(f"{' and '.join(learned)} is empty: there is nothing to learn")
        return prompt, completion

    def fill_prompt(self, row: Mapping[str, Any]) -> str:
        """Return the prompt of a row. Raises DataError if it lacks a column."""
        return _fill(self.prompt, row)


def parse_template(source: str, *, has_escapes: bool = True) -> RowTemplate:
    """Return the parts of a template; without `has_escapes` a backslash is one.

    Raises ConfigError if it has no column, nothing before what is learned, or a lone brace.
    """
    if has_escapes:
        source = source.replace("\\n", "\n").replace("\\t", "\t")
    pieces, border, end = list[Piece](), None, None
    for kind, text in _pieces(source):
        if end is not None and text.strip():
            raise _fault(source, f"{text!r} comes after ']]', where what is learned ends")
        if kind == "[[":
            if border is not None:
                raise _fault(source, "'[[' is there twice, and one part is learned")
            border = len(pieces)
        elif kind == "]]":
            if border is None:
                raise _fault(source, "']]' comes without '[['")
            end = len(pieces)
        elif end is None:
            pieces.append((kind == "column", text))
    if border is not None and end is None:
        raise _fault(source, "']]' is missing")
    return _split(source, pieces, border)


def _split(source: str, pieces: list[Piece], border: int | None) -> RowTemplate:
    columns = [number for number, (is_column, _) in enumerate(pieces) if is_column]
    if not columns:
        raise _fault(source, "it names no column in braces")
    border = columns[-1] if border is None else border
    prompt, completion = pieces[:border], pieces[border:]
    if not any(is_column for is_column, _ in completion):
        raise _fault(source, "no column is in what is learned")
    if prompt and not prompt[-1][0]:
        kept = prompt[-1][1].rstrip()
        completion.insert(0, (False, prompt[-1][1][len(kept) :]))
        prompt[-1] = (False, kept)
    if not any(text for _, text in prompt):
        what = "nothing stands before what is learned; for plain text take columns, as in text=body"
        raise _fault(source, what)
    return RowTemplate(source, tuple(p for p in prompt if p[1]), tuple(completion))


def _pieces(source: str) -> Iterator[tuple[str, str]]:
    """Yield the kind of each piece (text, column, a bracket) and its text or name."""
    done = 0
    for found in _MARK.finditer(source):
        if found.start() > done:
            yield "text", source[done : found.start()]
        done = found.end()
        mark = found[0]
        if mark in ("{{", "}}"):
            yield "text", mark[0]
        elif mark in ("[[", "]]"):
            yield mark, ""
        elif found[1] is None or not found[1].strip():
            raise _fault(source, f"{mark!r} names no column; write {{{{ or }}}} for a brace")
        else:
            yield "column", found[1].strip()
    if done < len(source):
        yield "text", source[done:]


def _fault(source: str, what: str) -> ConfigError:
    return ConfigError(f"Cannot use the template {source!r}: {what}. {_EXAMPLE}")


def _fill(pieces: tuple[Piece, ...], row: Mapping[str, Any]) -> str:
    return "".join(text_of_value(row, text) if is_column else text for is_column, text in pieces)


def text_of_value(row: Mapping[str, Any], name: str) -> str:
    """Return a column as text: a number as it is written, null as nothing.

    Raises DataError if the row has no such column, or it holds a list or an object.
    """
    if name not in row:
        near = did_you_mean(name, row)
        raise DataError(f"there is no column {name!r}. Columns here: {', '.join(row)}.{near}")
    value = row[name]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        check_text(value, name)
        return value
    if value is None or (isinstance(value, float) and is_blank(value)):
        return ""
    if isinstance(value, int | float):
        return str(value)
    raise DataError(f"{name} is {kind_of(value)}: a text or a number is needed")
