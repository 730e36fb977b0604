"""Files of a path, and the parts of a directory: for training, for validation, for a test.

A file's name, or that of a directory in it, tells the part: train, validation (valid, val, dev,
eval) or test. Files without such a word are for training. What is for a test is never trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora.data.reading.tables import TABLE_READERS
from lora.errors import DataError, DataNotFoundError, did_you_mean

Part = Literal["train", "validation", "test"]
OnMessage = Callable[[str], None]

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = tuple(TABLE_READERS)
SUFFIXES = TABLE_SUFFIXES + TEXT_SUFFIXES
PART_WORDS: dict[Part, frozenset[str]] = {
    "train": frozenset(("train", "training")),
    "test": frozenset(("test", "testing")),
    "validation": frozenset(("valid", "validation", "val", "dev", "eval")),
}
"""In the order in which they are looked for."""
_INSTEAD: dict[Part, tuple[Part | None, ...]] = {
    "train": (),
    "validation": (None, "test", "train"),
    "test": ("validation", None, "train"),
}
"""Parts that are taken where the wanted one has no files; None: files without a part's word."""
_DESCRIPTIONS = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json"))
"""Files that other tools write beside data."""
_MAX_NAMES = 12
"""Of files, in a message."""


@dataclass(frozen=True)
class FolderParts:
    """The files of a directory by part; None: those without a part's word."""

    folder: Path
    files: dict[Part | None, list[Path]]
    notes: tuple[str, ...]
    """What is skipped, in words."""

    def find(self, part: Part, on_message: OnMessage = lambda message: None) -> list[Path]:
        """Return the files of a part, or else of another that may stand for it.

        Raises DataError if all files are validation and test data, and some to train on are wanted.
        """
        found = self.files[part]
        if part == "train":
            found = sorted(found + self.files[None])
            if not found:
                raise DataError(
                    f"Cannot train on {self.folder}: its files are validation or test data by "
                    f"their names: {list_names(self._all())}. Rename those to train on, or name a "
                    "file itself."
                )
            return found
        for other in _INSTEAD[part]:
            if not found and self.files[other]:
                found = self.files[other]
                on_message(f"no {part} file in {self.folder}: {list_names(found)} stand for it")
        return found

    def _all(self) -> list[Path]:
        return sorted(path for paths in self.files.values() for path in paths)

    def describe(self) -> list[str]:
        """Return notes on the parts that are not trained on."""
        validation, test = self.files["validation"], self.files["test"]
        notes = []
        if validation:
            notes.append(f"not trained on, as validation data: {list_names(validation)}")
        if test:
            names = list_names(test)
            notes.append(f"never trained on, as test data: {names} (lora eval takes them)")
        return notes


def find_files(
    path: Path, part: Part = "train", on_message: OnMessage = lambda message: None
) -> list[Path]:
    """Return the files to read for a part: a file itself, or those of a directory.

    Raises DataError for a path that is missing or of no known format, or lacks the part.
    """
    if path.is_dir():
        parts = list_parts(path)
        found = parts.find(part, on_message)
        notes = parts.describe() if part == "train" else _name_part(found, parts.files[part], part)
        for note in (*parts.notes, *notes):
            on_message(note)
        return found
    if path.exists() and not path.is_file():
        raise DataError(
            f"Cannot read examples from {path}: it is a pipe or a device, and the suffix of a file "
            f"tells its format. Write it to a file first. Allowed: {' '.join(SUFFIXES)}."
        )
    if not path.is_file():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, names)
        raise DataNotFoundError(
            f"Cannot read examples from {path}: there is no such file or folder.{near}"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"Cannot read examples from {path}: its suffix is {path.suffix or 'empty'!r}. Allowed: "
            f"{' '.join(SUFFIXES)}.{did_you_mean(path.suffix, SUFFIXES)} Convert it, or rename it "
            "if it has one of these formats."
        )
    return [path]


def _name_part(found: Sequence[Path], own: Sequence[Path], part: Part) -> list[str]:
    """Return a note on the files of a part, where the directory has some of its own."""
    return [f"{part} data: {list_names(found)}"] if own else []


def list_parts(folder: Path) -> FolderParts:
    """Return the files of a directory by part. Raises DataError if none has a known format."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    paths = [p for p in paths if not any(n.startswith(".") for n in p.relative_to(folder).parts)]
    if any(p.suffix == ".arrow" for p in paths):
        raise DataError(
            f"Cannot read examples from {folder}: it has Arrow files, which save_to_disk writes. "
            "Write Parquet files with to_parquet, or pass the result of load_from_disk."
        )
    described = [p for p in paths if p.name in _DESCRIPTIONS]
    notes = [f"skipped as descriptions of data: {list_names(described)}"] if described else []
    paths = [p for p in paths if p.name not in _DESCRIPTIONS]
    tables = [p for p in paths if p.suffix.lower() in TABLE_SUFFIXES]
    texts = [p for p in paths if p.suffix.lower() in TEXT_SUFFIXES]
    found = tables or texts  # beside tables, a text is a README
    rest = [p for p in paths if p not in set(found)]
    if not found:
        seen = f" Files there: {list_names(rest)}." if rest else ""
        raise DataError(
            f"Cannot read examples from {folder}: none of its {len(paths)} files has a known "
            f"suffix.{seen} Allowed: {' '.join(SUFFIXES)}. Give a folder that has such files."
        )
    unknown = [p for p in rest if p not in set(texts)]
    if unknown:
        notes.append(f"skipped, with suffixes of no known format: {list_names(unknown)}")
    if len(unknown) < len(rest):
        notes.append(f"skipped as texts beside tables: {list_names(texts)}")
    files: dict[Part | None, list[Path]] = {"train": [], "validation": [], "test": [], None: []}
    for path in found:
        files[_part_of(path.relative_to(folder), is_text=not tables)].append(path)
    return FolderParts(folder, files, tuple(notes))


def _part_of(path: Path, *, is_text: bool) -> Part | None:
    """Return the part that a file's name tells, or else the names of its directories.

    Of a text the whole name must be the word, with numbers: test-plan.md is a document.
    """
    words = set(re.findall("[a-z]+", path.stem.lower()))
    if is_text and len(words) > 1:
        words = set()
    return _find_part(words) or _find_part(name.lower() for name in path.parts[:-1])


def _find_part(words: Iterable[str]) -> Part | None:
    found = set(words)
    return next((part for part, known in PART_WORDS.items() if found & known), None)


def list_names(paths: Sequence[Path]) -> str:
    """Return the names of files for a message."""
    names = ", ".join(path.name for path in paths[:_MAX_NAMES])
    more = len(paths) - _MAX_NAMES
    return f"{names} and {more:,} more" if more > 0 else names
