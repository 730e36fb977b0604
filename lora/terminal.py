"""What reaches the terminal: escaped, of limited length, in characters that its encoding has.

Everything that names something from outside (paths, keys, tensors, fields of files, settings) is
printed through here: control characters could change the terminal, square brackets are markup to
rich, and a name may have megabytes.
"""

from __future__ import annotations

import codecs
import contextlib
import faulthandler
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

MAX_MESSAGE_CHARACTERS = 8_000
# Control characters, those that reverse the direction of the text after them, and surrogates.
_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN = str.maketrans("–—‘’“”·…─│╭╮╰╯━┃█", "--''\"\"*.-|++++-|#")
_ENCODING_ERRORS = "lora.plain"


def visible(text: str, is_ascii: bool = False) -> str:
    """Return `text` with control characters written as escapes, and all but ASCII if `is_ascii`."""
    safe = _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return safe.encode("ascii", "backslashreplace").decode() if is_ascii else safe


def shortened(text: str, max_characters: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Return `text`, without its middle if it is longer than `max_characters`."""
    if len(text) <= max_characters:
        return text
    head, tail = max_characters * 3 // 4, max_characters // 4
    left_out = len(text) - head - tail
    return f"{text[:head]} … ({left_out:,} characters left out) … {text[-tail:]}"


def printable_answer(text: str) -> str:
    """Return a model's text as standard output takes it: on a terminal escaped, otherwise as it is.

    Tabs and line ends stay; a file or a pipe gets the bytes that the model wrote.
    """
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    return "\t".join(map(visible, text.split("\t")))


def printable_json(text: str) -> str:
    """Return a JSON text whose control characters are JSON's escapes: the values stay the same."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def print_line(text: str) -> None:
    """Print a message with names from outside on standard output."""
    print(visible(shortened(text)))


def print_note(text: str) -> None:
    """Print a message on standard error; if it cannot be written, it is lost without an error."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        print(visible(shortened(text)), file=sys.stderr, flush=True)


def escaping_log(name: str) -> logging.Logger:
    """Return the logger `name`, whose messages are escaped and shortened for every handler."""
    log = logging.getLogger(name)
    log.addFilter(_escape_record)
    return log


@contextlib.contextmanager
def silent(*names: str) -> Iterator[None]:
    """Within the block the loggers `names` say nothing."""
    loggers = [logging.getLogger(name) for name in names]
    before = [log.disabled for log in loggers]
    for log in loggers:
        log.disabled = True
    try:
        yield
    finally:
        for log, was_disabled in zip(loggers, before, strict=True):
            log.disabled = was_disabled


class _OnceHandler(logging.Handler):
    """Prints each warning once, on standard error as it is at that moment."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._printed:
            self._printed.add(message)
            print_note(message)


@contextlib.contextmanager
def repeats_dropped() -> Iterator[None]:
    """Context manager: what our loggers warn of is printed once, however often it is logged.

    A plan, a run and each candidate of a sweep apply LoRA to the same model. A program that has
    given the root logger a handler shows the messages itself.
    """
    log, handler = logging.getLogger("lora"), _OnceHandler()
    if logging.getLogger().handlers:
        yield
        return
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _escape_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible(shortened(record.getMessage())), ()
    return True


def build_console(file: IO[str] | None = None) -> Console:
    """Return a rich console that escapes and shortens strings and parses no markup.

    `file` is standard output by default. Text objects are printed as they are: their maker
    escapes what is from outside.
    """
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(shortened(text)), **options)

    return PlainConsole(file=file, markup=False, emoji=False, highlight=False)


def soften_encoding() -> None:
    """Make standard output and error replace what their encoding lacks, instead of failing."""
    codecs.register_error(_ENCODING_ERRORS, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ENCODING_ERRORS)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = error.object[error.start : error.end].translate(_PLAIN)
    return plain.encode("ascii", "backslashreplace").decode(), error.end


def report_crashes() -> None:
    """Make the end of the process by a fault print where it was: the shell says "Bus error" alone.

    A mapped file that becomes shorter ends it so, and no handler in Python can say more.
    """
    if sys.stderr is not None and not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError):  # a stream without a file
            faulthandler.enable(all_threads=False)


def end_output() -> None:
    """Flush standard output and error; what cannot be written is dropped.

    Python would end with exit code 120 where it cannot flush a stream at the end.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            _drop(stream)


def drop_output() -> None:
    """Send the rest of standard output nowhere, so that the end of the process meets no error."""
    _drop(sys.stdout)


def _drop(stream: IO[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
