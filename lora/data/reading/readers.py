"""Examples from files, folders and rows in memory; all faults of the data are raised together.

Each file is read once, row by row where its format allows: .jsonl .ndjson .json .csv .tsv .parquet,
and .txt .md as one text per file. A folder is read in the order of its files' names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora.data.prompting.labels import label_template, sort_labels
from lora.data.prompting.rules import ReadingRules
from lora.data.reading.cells import kind_of
from lora.data.reading.faults import Faults, decode_file
from lora.data.reading.formats import (
    LABELLED,
    Example,
    ask_for_labels,
    example_from_file,
    example_from_row,
)
from lora.data.reading.tables import TABLE_READERS, without_nulls
from lora.data.sources.dataset_info import describe_file
from lora.data.sources.files import TEXT_SUFFIXES, OnMessage, Part, find_files, list_parts
from lora.data.sources.hub import parse_hub_name, read_hub_rows
from lora.errors import DataError
from lora.runs.disk import os_reason

Source = str | Path | Iterable[Mapping[str, Any]]

_MAX_NAMES = 12
"""Of labels, in a message."""
_RULES = ReadingRules()


def read_examples(
    source: Source,
    on_message: OnMessage = lambda message: None,
    *,
    rules: ReadingRules = _RULES,
    part: Part = "train",
) -> list[Example]:
    """Return the examples of a file, a folder, a `datasets.Dataset` or a list of dicts.

    Args:
        source: what to read.
        on_message: called with the files of a folder that are skipped; hidden ones are not named.
        rules: what rows become.
        part: which files of a folder, or which split of a data set of the hub.

    Raises:
        DataError: the source is missing, empty or damaged, or rows of it fit no format. One message
            lists all faults of all files, with their lines.
        DependencyError: pyarrow is needed for a Parquet file and not installed.
    """
    return read_with_labels(source, on_message, rules, part)[0]


def _read(source: Source, on_message: OnMessage, rules: ReadingRules, part: Part) -> list[Example]:
    if isinstance(source, Mapping):
        raise DataError(
            f"Cannot read examples from a {type(source).__name__} with the keys "
            f"{', '.join(map(str, source))}: rows are needed. Pass one split, as in data['train']."
        )
    if not isinstance(source, str | Path | Iterable):
        raise DataError(
            f"Cannot read examples from {kind_of(source)}. Allowed: a path, a list of dicts, or a "
            "datasets.Dataset."
        )
    faults = Faults()
    examples = list(_read_all(source, part, on_message, faults, rules))
    heading = f"Cannot use the examples in {_name(source)}:"
    faults.raise_if_any(heading, "Correct or remove these rows; nothing was used.")
    if not examples:
        raise DataError(f"Cannot use the examples in {_name(source)}: it has none. Add some rows.")
    return examples


def read_with_labels(
    source: Source, on_message: OnMessage, rules: ReadingRules, part: Part = "train"
) -> tuple[list[Example], ReadingRules]:
    """Return the examples as `read_examples` does, and the rules with the labels that were found.

    Other data of the same task are read with these rules.
    """
    examples = _read(source, on_message, rules, part)
    named = [n for n, example in enumerate(examples) if example.format == LABELLED]
    if not named:
        return examples, rules
    found = Counter(_label_of(examples[n]) for n in named)
    known = rules.labels or ()
    unknown = {label: n for label, n in found.items() if label not in known}
    if rules.label_template is None or (part == "train" and unknown):
        labels = sort_labels((*known, *found))
        rules = replace(rules, labels=labels, label_template=label_template(labels))
    elif unknown and known:
        on_message(
            f"note: {sum(unknown.values()):,} of {len(named):,} texts have a label that the "
            f"training data did not have: {', '.join(list(unknown)[:_MAX_NAMES])}"
        )
    if part == "train":
        on_message(_count_labels(rules.labels or (), found))
    template = rules.label_template
    if template is not None:  # always so by now
        for n in named:
            examples[n] = ask_for_labels(examples[n], template)
    return examples, rules


def _count_labels(labels: Sequence[str], found: Mapping[str, int]) -> str:
    counts = ", ".join(f"{label} ({found.get(label, 0):,})" for label in labels[:_MAX_NAMES])
    more = f" and {len(labels) - _MAX_NAMES:,} more" if len(labels) > _MAX_NAMES else ""
    n_texts = sum(found.values())
    return f"classification of {n_texts:,} texts, {len(labels):,} labels: {counts}{more}"


def _label_of(example: Example) -> str:
    answer = example.messages[-1]["content"] if example.messages else example.completion
    return str(answer)


def has_part(source: Source, part: Part) -> bool:
    """Return whether a folder, or a data set of the hub, has a part of its own."""
    if not isinstance(source, str | Path):
        return False
    name = parse_hub_name(source)
    if name is not None:
        return name.has_part(part)
    path = Path(source)
    return path.is_dir() and bool(list_parts(path).files[part])


def _read_all(
    source: Source, part: Part, on_message: OnMessage, faults: Faults, rules: ReadingRules
) -> Iterator[Example]:
    if not isinstance(source, str | Path):
        rows = ((f"row {n}", without_nulls(row)) for n, row in enumerate(source, 1))
        yield from _parse_rows(rows, faults, rules)
        return
    name = parse_hub_name(source)
    if name is not None:
        yield from _parse_rows(read_hub_rows(name, part, on_message), faults, rules)
        return
    for path in find_files(Path(source), part, on_message):
        try:
            yield from _read_file(path, faults, rules, on_message)
        except OSError as error:
            faults.add(str(path), f"cannot read the file: {os_reason(error)}")


def _read_file(
    path: Path, faults: Faults, rules: ReadingRules, on_message: OnMessage
) -> Iterator[Example]:
    if path.stat().st_size == 0:
        faults.add(str(path), "the file is empty")
    elif path.suffix.lower() in TEXT_SUFFIXES:
        yield from _read_text(path, faults, rules)
    else:
        rows = TABLE_READERS[path.suffix.lower()](path, faults)
        says_itself = rules.columns or rules.template is not None
        described = None if says_itself else describe_file(path, on_message)
        if described is not None:
            convert = described.convert
            rows = ((where, convert(row)) for where, row in rows)
        yield from _parse_rows(rows, faults, rules)


def _parse_rows(
    rows: Iterable[tuple[str, object]], faults: Faults, rules: ReadingRules
) -> Iterator[Example]:
    for where, row in rows:
        try:
            yield example_from_row(row, where, rules)
        except DataError as error:
            faults.add(where, error)
            if faults.are_too_many:
                return


def _read_text(path: Path, faults: Faults, rules: ReadingRules) -> Iterator[Example]:
    text = decode_file(path, faults)
    of_rows = {"system": rules.system, "columns": rules.columns, "template": rules.template}
    given = [name for name, value in of_rows.items() if value]
    if given:
        what = f"the setting {given[0]} has no place in a text file: leave it out"
        faults.add(str(path), what)
    elif text is not None and text.strip():
        yield example_from_file(text, str(path))
    elif text is not None:
        faults.add(str(path), "the file has only white space")


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "the given list of rows"
