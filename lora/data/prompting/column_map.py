"""The setting `columns`: which column of the data has which part of an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora.data.reading.cells import is_blank
from lora.data.reading.columns import CONTEXT, KEYS
from lora.errors import ConfigError, DataError, did_you_mean

PARTS = tuple(dict.fromkeys((*KEYS, *CONTEXT)))
"""Names of parts, which are those that are recognised without the setting."""


def check_column_map(columns: Mapping[str, str]) -> None:
    """Raise ConfigError for a part that no format has, and for a column that is named twice."""
    for part in columns:
        if part not in PARTS:
            raise ConfigError(
                f"Cannot use columns: {part!r} is no part of an example."
                f"{did_you_mean(part, PARTS)} Allowed: {', '.join(PARTS)}. Write part=column, as "
                "in prompt=question."
            )
    named = [column for column in columns.values() if column]
    twice = sorted({column for column in named if named.count(column) > 1})
    if twice:
        raise ConfigError(
            f"Cannot use columns: {', '.join(map(repr, twice))} is named for two parts. Name a "
            "column once, or take a template."
        )


def map_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with its columns under the names of their parts.

    Columns that stand under the name of another's part are left out. Raises DataError if the row
    lacks a column.
    """
    missing = [column for column in columns.values() if column and column not in row]
    if missing:
        near = did_you_mean(missing[0], row)
        raise DataError(
            f"there is no column {', '.join(map(repr, missing))}, which the setting columns names. "
            f"Columns here: {', '.join(row)}.{near}"
        )
    taken = set(columns.values())
    mapped = {part: row[column] for part, column in columns.items() if column}
    return mapped | {k: v for k, v in row.items() if k not in taken and k not in columns}


def left_out(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the filled columns that the mapping itself leaves out."""
    taken = set(columns.values())
    return tuple(k for k in columns if k in row and k not in taken and not is_blank(row[k]))
