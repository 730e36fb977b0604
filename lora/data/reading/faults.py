"""Faults of data files, gathered with where they are, and the largest example that is read."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

from lora.errors import DataError, gather

BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
MAX_EXAMPLE_CHARACTERS = 1 << 24
"""Of one row of a table: what parsing it may take in memory is a multiple of its size."""
MAX_TEXT_FILE_BYTES = 1 << 31
"""Of a text file, which is one example."""
_MAX_FAULTS = 1000  # distinct ones; after that the rest of the data is not read
_UNDECODED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of bytes not in UTF-8


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


def too_large(what: str = "the row") -> str:
    """Return the fault of an example that is larger than any that is read."""
    return (
        f"{what} has more than {MAX_EXAMPLE_CHARACTERS:,} characters, the most of one example: "
        "split it into several"
    )


def decode_file(path: Path, faults: Faults) -> str | None:
    """Return a file's text with line ends as \\n and without leading byte order marks."""
    if path.stat().st_size > MAX_TEXT_FILE_BYTES:
        what = f"a text file of more than {MAX_TEXT_FILE_BYTES:,} bytes, the most of one example"
        faults.add(str(path), f"{what}: split it into several files")
        return None
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        faults.add(f"{path}:{line}", not_utf8(data, error))
        return None
    return text.lstrip(BOM).replace("\r\n", "\n").replace("\r", "\n")


def not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """Return the fault of bytes that are not UTF-8."""
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    advice = "it looks like UTF-16: save it as UTF-8" if utf16 else "save the file as UTF-8"
    return f"byte {data[error.start]:#04x} is not UTF-8 ({error.reason}); {advice}"


def open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """Open a file as UTF-8; bytes that are not become surrogates, which `undecoded` finds.

    Lines end at \\n, \\r\\n or \\r, whichever system wrote them; `newline` is as in `open`.
    """
    return path.open(encoding="utf-8", errors="surrogateescape", newline=newline)


def undecoded(text: str) -> tuple[int, str] | None:
    """Return where a text of `open_text` has a byte that is not UTF-8, and the fault."""
    found = None if text.isascii() else _UNDECODED.search(text)
    if found is None:
        return None
    data = text.encode(errors="surrogateescape")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return found.start(), not_utf8(data, error)
    return None


def bounded_lines(file: io.TextIOWrapper) -> Iterator[str | None]:
    """Yield a file's lines; None for one that is larger than an example may be.

    Of such a line no more than that is in memory at any time.
    """
    while line := file.readline(MAX_EXAMPLE_CHARACTERS + 1):
        if len(line) <= MAX_EXAMPLE_CHARACTERS or line[-1] in "\r\n":
            yield line
            continue
        del line
        while rest := file.readline(MAX_EXAMPLE_CHARACTERS):
            if rest[-1] in "\r\n":
                break
        yield None
