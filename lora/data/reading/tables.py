"""Rows of CSV and Parquet files, each with its file and line; the readers of all tables.

A damaged row is recorded as a fault, and reading continues after it where the format allows.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora.data.reading.faults import (
    BOM,
    MAX_EXAMPLE_CHARACTERS,
    Faults,
    bounded_lines,
    not_utf8,
    open_text,
    too_large,
)
from lora.data.reading.json_rows import Rows, read_json, read_json_lines
from lora.errors import DependencyError
from lora.settings.install import install_extra

_MAX_BATCH_ROWS, _MAX_BATCH_BYTES = 1024, 1 << 26


def _read_csv(path: Path, faults: Faults) -> Rows:
    former = csv.field_size_limit(MAX_EXAMPLE_CHARACTERS)  # global in the process; restored below
    try:
        # Bytes that are not UTF-8 become surrogates, which are refused in every row.
        with open_text(path, newline="") as file:
            yield from _csv_rows(path, _RowLines(bounded_lines(file)), faults)
    finally:
        csv.field_size_limit(former)


class _RowLines:
    """The lines of a CSV file, of which one row may take so many characters and no more."""

    def __init__(self, lines: Iterator[str | None]) -> None:
        self._lines, self.n_left = lines, MAX_EXAMPLE_CHARACTERS

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.n_left -= MAX_EXAMPLE_CHARACTERS + 1 if line is None else len(line)
        if line is None or self.n_left < 0:
            raise csv.Error(f"{too_large()}, or close the quote that opens a field of it")
        return line


def _csv_rows(path: Path, lines: _RowLines, faults: Faults) -> Rows:
    try:
        header = next(lines, "").lstrip(BOM)
    except csv.Error as error:
        faults.add(f"{path}:1", f"not CSV: {error}")
        return
    # With equal counts (as in a header of one name: none at all) the first delimiter wins.
    delimiter = max("\t,;" if path.suffix.lower() == ".tsv" else ",;\t", key=header.count)
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    number = 1
    while True:
        lines.n_left = MAX_EXAMPLE_CHARACTERS
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            faults.add(f"{path}:{number}", f"not CSV: {error}")
            return
        where, number = f"{path}:{number}", reader.line_num + 1
        if not names:
            names = [name.strip().lstrip(BOM) for name in values]
            if not _is_header(names, where, faults):
                return
        elif len(values) == len(names):
            if _has_names(names, values, where, faults):
                yield where, dict(zip(names, values, strict=True))
        elif values:
            faults.add(where, f"{len(values)} fields, but the header names {len(names)}")
        if faults.are_too_many:
            return


def _is_header(names: list[str], where: str, faults: Faults) -> bool:
    data = ",".join(names).encode(errors="surrogateescape")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        faults.add(where, not_utf8(data, error))
        return False
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        faults.add(where, f"the header names {', '.join(map(repr, twice))} more than once")
    return not twice


def _has_names(names: list[str], values: list[str], where: str, faults: Faults) -> bool:
    """Return whether at most one value has a column without a name: of two, one would be lost."""
    if names.count("") < 2:
        return True
    found = [n for n, (name, value) in enumerate(zip(names, values, strict=True), 1) if not name]
    lost = [str(n) for n in found if values[n - 1].strip()]
    if lost:
        faults.add(where, f"values in columns without a name ({', '.join(lost)}): name them")
    return not lost


def _read_parquet(path: Path, faults: Faults) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DependencyError(
            f"Cannot read {path}: pyarrow is not installed. Run: {install_extra('data')}"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
            if twice:
                what = f"{', '.join(map(repr, twice))} is the name of more than one column"
                faults.add(str(path), f"{what}: keep or rename")
                return
            for number, row in enumerate(_parquet_rows(file), 1):
                if row is None:
                    faults.add(f"{path}:row {number}", too_large())
                else:
                    yield f"{path}:row {number}", without_nulls(row)
                if faults.are_too_many:
                    return
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        faults.add(f"{path}:row {number + 1}", f"cannot read as Parquet: {error}")


def _parquet_rows(file: Any) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a `ParquetFile`; None for one that is larger than an example may be.

    Arrow decompresses a whole page of a column at a time, so a group of rows whose size tells that
    one of them is too large is not read.
    """
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        row_bytes = group.total_byte_size / max(1, group.num_rows)
        if row_bytes > MAX_EXAMPLE_CHARACTERS:
            yield from [None] * min(group.num_rows, 1)
            return
        size = max(1, min(_MAX_BATCH_ROWS, int(_MAX_BATCH_BYTES / max(1.0, row_bytes))))
        for batch in file.iter_batches(batch_size=size, row_groups=[number]):
            if batch.nbytes <= _MAX_BATCH_BYTES // 4:
                yield from batch.to_pylist()
                continue
            for index in range(batch.num_rows):
                one = batch.slice(index, 1)
                yield None if one.nbytes > MAX_EXAMPLE_CHARACTERS else one.to_pylist()[0]


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
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
