"""Texts in every Python installation: its language reference, and its library's source."""

from __future__ import annotations

import importlib
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from lora.data.tokenizers.characters import read_text_file
from lora.errors import DataError
from lora.runs.disk import os_reason

VALIDATION_FRACTION = 0.1
CODE_PACKAGES = ("asyncio", "collections", "concurrent", "email", "http", "json", "logging", "xml")
MACHINE_FILES = ("_sysconfigdata", "sitecustomize")
"""Prefixes of files that describe the machine, not the library."""
MAX_CODE_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class Corpus:
    """A text split into training and validation parts that share no passage."""

    train: str
    validation: str
    described: str
    """What the text is, for messages."""


def prose() -> Corpus:
    """Return the help texts of Python's language reference; the last topics are for validation.

    Topics repeat each other: paragraphs of the validation part are removed from the training part.
    Raises DataError if the standard library lacks them.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DataError(
            "Cannot load the built-in prose: this Python lacks pydoc_data.topics. Give a text file "
            "of your own."
        ) from None
    texts = [topics[name] for name in sorted(topics)]
    return _split(texts, "the prose of Python's language reference")


def code() -> Corpus:
    """Return the source of the standard library's modules; every tenth file is for validation.

    Files are read as text and nothing is imported. Raises DataError if the standard library lacks
    its source.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in library.glob("*.py") if not p.name.startswith(MACHINE_FILES))
    for package in CODE_PACKAGES:
        paths += sorted((library / package).rglob("*.py"))
    texts = _read_files(paths, MAX_CODE_CHARACTERS)
    if len(texts) < 10:
        raise DataError(
            "Cannot load the standard library's source: this Python lacks it. Give a text file of "
            "your own."
        )
    # A fixed stride spreads the validation files over the alphabet: neighbours are often alike.
    validation = [text for number, text in enumerate(texts) if number % 10 == 9]
    train = [text for number, text in enumerate(texts) if number % 10 != 9]
    described = "the source code of Python's standard library"
    return Corpus("\n".join(train), "\n".join(validation), described)


def corpus_from_file(path: Path) -> Corpus:
    """Return a text file as a corpus; its last tenth is for validation."""
    text = read_text_file(path)
    border = round(len(text) * (1 - VALIDATION_FRACTION))
    return Corpus(text[:border], text[border:], str(path))


def _read_files(paths: list[Path], max_characters: int) -> list[str]:
    texts: list[str] = []
    total = 0
    for path in paths:
        if total >= max_characters:
            break
        try:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise DataError(
                f"Cannot read {path} of the standard library: {os_reason(error)}. Give a text file "
                "of your own."
            ) from None
        total += len(texts[-1])
    return texts


def _split(texts: list[str], described: str) -> Corpus:
    wanted = sum(map(len, texts)) * (1 - VALIDATION_FRACTION)
    length, number = 0, 0
    while length < wanted:
        length += len(texts[number])
        number += 1
    validation = "\n".join(texts[number:])
    excluded = {_words(paragraph) for paragraph in _paragraphs(validation)}
    kept = (p for p in _paragraphs("\n".join(texts[:number])) if _words(p) not in excluded)
    return Corpus("\n\n".join(kept), validation, described)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text)


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())  # an indented copy is the same paragraph
