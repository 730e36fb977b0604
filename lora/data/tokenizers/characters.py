"""Character tokenizer: one token per character, and one symbol for all unknown ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lora.errors import DataError, DataNotFoundError, did_you_mean
from lora.runs.disk import atomic_write, os_reason

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
FIXED_CHARACTERS = "\n\t" + "".join(chr(code) for code in range(0x20, 0x7F))
MAX_UNKNOWN_FRACTION = 0.01
MAX_CHARACTERS = 65_536


class CharTokenizer:
    """Maps characters to token ids and back.

    Without arguments: newline, tab, the 95 printable characters of ASCII and the unknown symbol,
    98 tokens. Raises DataError for an empty or repetitive list of characters.
    """

    def __init__(self, characters: str = FIXED_CHARACTERS + UNKNOWN) -> None:
        if len(set(characters)) != len(characters) or not 2 <= len(characters) <= MAX_CHARACTERS:
            raise DataError(
                f"Cannot build a vocabulary of {len(characters)} characters, "
                f"{len(set(characters))} of them distinct. Allowed: 2 to {MAX_CHARACTERS}, all "
                "distinct."
            )
        self.characters = characters
        unknown = characters.find(UNKNOWN)
        codes = np.array([ord(character) for character in characters])
        self._table = np.full(0x110000, unknown, dtype=np.int32)  # by code point
        self._table[codes] = np.arange(len(characters))

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Return the vocabulary of `text`, sorted, without an unknown symbol unless it has one.

        Raises DataError for a text with fewer than two distinct characters.
        """
        characters = "".join(sorted(set(text)))
        if len(characters) < 2:
            seen = "is empty" if not text else f"has only the character {characters!r}"
            raise DataError(
                f"Cannot build a vocabulary: the training text {seen}. Give a longer text."
            )
        return cls(characters)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, V."""
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of `text`, (N,) int64; unknown characters become the symbol.

        Raises DataError for unknown characters if the vocabulary has no symbol for them.
        """
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        tokens = self._table[codes].astype(np.int64)
        if len(tokens) and tokens.min() < 0:
            raise DataError(
                "Cannot tokenise the text: the model's vocabulary lacks the characters "
                f"{describe_characters(self.count_unknown(text))}. Train a base on a text that "
                "has them, or remove them."
            )
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`."""
        return "".join(self.characters[token] for token in tokens)

    def count_unknown(self, text: str) -> Counter[str]:
        """Count the characters of `text` that the vocabulary lacks."""
        known = set(self.characters)
        return Counter({c: n for c, n in Counter(text).items() if c not in known})

    def check(self, text: str, what: str) -> str:
        """Return a message about the unknown characters of `text`, or "" if it has none.

        Raises DataError, with a list of them, if they are more than one per cent of it.
        """
        unknown = self.count_unknown(text)
        count, share = unknown.total(), unknown.total() / max(1, len(text))
        if not count:
            return ""
        line = f"{what}: {count:,} of {len(text):,} characters ({share:.2%}) are unknown"
        if share > MAX_UNKNOWN_FRACTION:
            raise DataError(
                f"{line}: {describe_characters(unknown)}. Allowed: {MAX_UNKNOWN_FRACTION:.0%}. "
                "Train a base on this text instead (its vocabulary is then the text's own)."
            )
        return f"{line} and become one symbol: {describe_characters(unknown)}"

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        text = json.dumps({"characters": self.characters}, ensure_ascii=True, indent=2)
        atomic_write(path, (text + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> CharTokenizer:
        """Return the vocabulary saved at `path`. Raises DataError if it is missing or damaged."""
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
            characters = value["characters"]
        except OSError as error:
            raise DataError(f"Cannot read the vocabulary {path}: {os_reason(error)}.") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"Cannot read {path} as a character vocabulary: {error!r}.") from None
        if not isinstance(characters, str):
            raise DataError(
                f"Cannot read {path}: characters is {type(characters).__name__}, not a string."
            )
        return cls(characters)


def describe_characters(counts: Counter[str], max_shown: int = 12) -> str:
    """Return the most common characters with their counts, for a message."""
    shown = ", ".join(f"{c!r} ×{n}" for c, n in counts.most_common(max_shown))
    return shown + (f" and {len(counts) - max_shown} more" if len(counts) > max_shown else "")


def read_text_file(path: Path) -> str:
    """Return the content of a UTF-8 text file, with newlines as \\n.

    Raises DataError if it is missing (near names offered), empty, a folder or not UTF-8.
    """
    if not path.is_file():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        seen = "is a folder" if path.is_dir() else "does not exist"
        kind = DataError if path.exists() else DataNotFoundError
        raise kind(
            f"Cannot read the text {path}: it {seen}.{did_you_mean(path.name, names)} Name a file."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"Cannot read the text {path}: {os_reason(error)}.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"Cannot read the text {path}: it is not UTF-8: byte {error.start} is "
            f"{error.object[error.start]:#04x}. Convert it, for example with iconv."
        ) from None
    if not text:
        raise DataError(f"Cannot use the text {path}: it is empty. Give a longer text.")
    return text
