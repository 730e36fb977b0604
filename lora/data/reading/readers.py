"""Examples from files, folders and rows in memory; all faults of the data are raised together.

Each file is read once, row by row where its format allows: .jsonl .ndjson .json .csv .tsv .parquet,
and .txt .md as one text a file. A folder is read in the order of its files' names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora.data.reading.formats import Example, example_from_file, example_from_row
from lora.data.reading.messages import kind_of
from lora.data.reading.tables import TABLE_READERS, Faults, decode_file, without_nulls
from lora.errors import DataError, DataNotFoundError, did_you_mean

Source = str | Path | Iterable[Mapping[str, Any]]
OnMessage = Callable[[str], None]

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = tuple(TABLE_READERS)

_VALIDATION_WORDS = frozenset(("valid", "validation", "val", "dev", "eval", "test"))


def read_examples(source: Source, on_message: OnMessage = lambda message: None) -> list[Example]:
    """Return the examples of a file, a folder, a `datasets.Dataset` or a list of dicts.

    Args:
        source: what to read.
        say: hears what was left out of a folder.

    Raises:
        DataError: the source is missing, empty or damaged, or rows of it fit no format. All faults
            of all files are in one message, with their lines.
        DependencyError: a Parquet file is read and pyarrow is not installed.
    """
    if isinstance(source, Mapping):
        raise DataError(
            f"Examples were asked for from a {type(source).__name__} with the keys "
            f"{', '.join(map(str, source))}: rows are needed. Pass one split, as in data['train']."
        )
    if not isinstance(source, str | Path | Iterable):
        raise DataError(
            f"Examples were asked for from {kind_of(source)}: allowed are a path, a list of dicts "
            "and a datasets.Dataset."
        )
    faults = Faults()
    examples = list(_read_all(source, on_message, faults))
    heading = f"{_name(source)} was read for examples and has faults:"
    faults.raise_if_any(heading, "Mend or remove these rows; nothing was used.")
    if not examples:
        raise DataError(f"{_name(source)} was read for examples and holds none: add some rows.")
    return examples


def _read_all(source: Source, on_message: OnMessage, faults: Faults) -> Iterator[Example]:
    if not isinstance(source, str | Path):
        rows = ((f"row {n}", without_nulls(row)) for n, row in enumerate(source, 1))
        yield from _parse_rows(rows, faults)
        return
    for path in _find_files(Path(source), on_message):
        try:
            yield from _read_file(path, faults)
        except OSError as error:
            faults.add(str(path), f"the file cannot be read: {error.strerror or error}")


def _read_file(path: Path, faults: Faults) -> Iterator[Example]:
    if path.stat().st_size == 0:
        faults.add(str(path), "the file is empty")
    elif path.suffix.lower() in TEXT_SUFFIXES:
        yield from _read_text(path, faults)
    else:
        yield from _parse_rows(TABLE_READERS[path.suffix.lower()](path, faults), faults)


def _parse_rows(rows: Iterable[tuple[str, object]], faults: Faults) -> Iterator[Example]:
    for where, row in rows:
        try:
            yield example_from_row(row, where)
        except DataError as error:
            faults.add(where, error)
            if faults.are_too_many:
                return


def _find_files(path: Path, on_message: OnMessage) -> list[Path]:
    allowed = TABLE_SUFFIXES + TEXT_SUFFIXES
    if path.is_dir():
        return _find_in_folder(path, on_message)
    if not path.is_file():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, names)
        raise DataNotFoundError(
            f"{path} was asked for examples: there is no such file or folder.{near}"
        )
    if path.suffix.lower() not in allowed:
        raise DataError(
            f"{path} was asked for examples: files that end in {path.suffix or 'nothing'!r} are "
            f"not read; allowed are {' '.join(allowed)}.{did_you_mean(path.suffix, allowed)} "
            "Convert it, or rename it if it is one of these."
        )
    return [path]


def _find_in_folder(folder: Path, on_message: OnMessage) -> list[Path]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    paths = [p for p in paths if not any(n.startswith(".") for n in p.relative_to(folder).parts)]
    if any(p.suffix == ".arrow" for p in paths):
        raise DataError(
            f"{folder} was asked for examples: it holds Arrow files, as save_to_disk writes them. "
            "Write Parquet files with to_parquet, or pass what load_from_disk returns."
        )
    tables = [p for p in paths if p.suffix.lower() in TABLE_SUFFIXES]
    texts = [p for p in paths if p.suffix.lower() in TEXT_SUFFIXES]
    found = tables or texts  # beside tables, texts are a README
    if not found:
        allowed = " ".join(TABLE_SUFFIXES + TEXT_SUFFIXES)
        raise DataError(
            f"{folder} was asked for examples: none of its {len(paths)} files ends in {allowed}. "
            "Give a folder that has such files."
        )
    if any("train" in _words(p) for p in found):
        validation = [
            p for p in found if _words(p) & _VALIDATION_WORDS and "train" not in _words(p)
        ]
        found = [p for p in found if p not in validation]
        if validation:
            on_message(f"left for evaluation, not read: {', '.join(p.name for p in validation)}")
    return found


def _words(path: Path) -> set[str]:
    return set(re.findall("[a-z]+", path.stem.lower()))


def _read_text(path: Path, faults: Faults) -> Iterator[Example]:
    text = decode_file(path, faults)
    if text is not None and text.strip():
        yield example_from_file(text, str(path))
    elif text is not None:
        faults.add(str(path), "the file holds only spaces")


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "The given list of rows"
