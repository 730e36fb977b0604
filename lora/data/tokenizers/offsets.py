"""Character offsets of tokens, computed from the tokens' own bytes.

What differs from the textbook: a tokenizer can return offsets, but tracking them costs it a third
of its time, and converting them to Python objects costs as much again. The tokens of a byte-level
vocabulary are pieces of the text: joined they are its bytes, which is checked for every text, so
their lengths give the offsets. For any other tokenizer, its own offsets are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from lora.data.tokenizers.subword import TextTokenizer

Ids = NDArray[np.int32]
Ints = NDArray[np.int64]
TokenOffsets = tuple[Sequence[int] | Ints, Sequence[int] | Ints]
"""First character of each token, and the one after its last, both (n,). A character that spans
several tokens is inside each of them."""

_PROBE = " The  quick\n\n brown\t fox's 3.14 \n"
_IN_NO_TEXT = b"\xff"  # a byte that no UTF-8 text has: such a token never matches


class OffsetFinder:
    """Tokenises texts, without adding special tokens, and finds their tokens' character offsets."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        self._bytes = _TokenBytes(tokenizer.backend)
        # Some tokenizers trim spaces out of their offsets: theirs are used, never computed ones.
        probe = self._backend.encode(_PROBE, add_special_tokens=False)
        own = self._compute(_PROBE, probe.ids, np.asarray(probe.ids, np.int32))
        self.computes = own is not None and _are_equal(own, as_token_offsets(probe.offsets))
        """Whether tokens are pieces of the text, whose lengths give the offsets."""

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text for `find`, tokenised in parallel."""
        if self.computes:
            return self._tokenizer.encode_fast(texts)
        return self._tokenizer.encode_with_offsets(texts)

    def find(self, text: str, encoding: Encoding, ids: list[int], tokens: Ids) -> TokenOffsets:
        """Return the offsets of the tokens of `text`, equal to the tokenizer's own.

        `ids` and `tokens` are the ids of `encoding`, as a list and as an array (n,): callers have
        both anyway, and each takes time to convert.
        """
        if not self.computes:
            return as_token_offsets(encoding.offsets)
        offsets = self._compute(text, ids, tokens)
        return offsets or as_token_offsets(self._tokenizer.encode_with_offsets([text])[0].offsets)

    def _compute(self, text: str, ids: list[int], tokens: Ids) -> TokenOffsets | None:
        """Return the tokens' offsets, or None if their bytes are not the text's."""
        data = text.encode()
        if b"".join(map(self._bytes.__getitem__, ids)) != data:
            return None
        lengths = self._bytes.lengths[tokens]
        ends = lengths.cumsum()  # in bytes, (n,)
        starts = ends - lengths
        if len(data) == len(text):
            return starts, ends
        begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # a character's first byte
        before = np.concatenate([[0], np.cumsum(begins)])  # characters that begin before each byte
        return before[starts + 1] - 1, before[ends]


def as_token_offsets(offsets: Sequence[tuple[int, int]]) -> TokenOffsets:
    """Return a tokenizer's (start, end) pairs as two lists, starts and ends."""
    return [start for start, _ in offsets], [end for _, end in offsets]


def _are_equal(one: TokenOffsets, other: TokenOffsets) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


class _TokenBytes(dict[int, bytes]):
    """Bytes of text per token id of a byte-level vocabulary, computed on demand."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        self._backend = backend
        added = backend.get_added_tokens_decoder().items()
        self._added = {number: token.content for number, token in added}
        self._alphabet = {letter: byte for byte, letter in enumerate(byte_letters())}
        self.lengths: Ints = np.zeros(0, np.int64)
        """Byte lengths of the tokens seen so far, by id."""

    def __missing__(self, number: int) -> bytes:
        value = self._read(number)
        if number >= len(self.lengths):
            room = max(number + 1, 2 * len(self.lengths))
            self.lengths = np.concatenate([self.lengths, np.zeros(room, np.int64)])
        self[number], self.lengths[number] = value, len(value)
        return value

    def _read(self, number: int) -> bytes:
        if number in self._added:
            return self._added[number].encode()
        token = self._backend.id_to_token(number)
        if not token or not self._alphabet.keys() >= set(token):
            return _IN_NO_TEXT
        return bytes(self._alphabet[letter] for letter in token)


def byte_letters() -> list[str]:
    """Return the character that byte-level vocabularies use for each byte, indexed by byte.

    Printable bytes map to themselves, the others to the characters from 256 on, in order
    (GPT-2's `bytes_to_unicode`).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
