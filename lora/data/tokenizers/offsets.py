"""Where tokens stand in their text, found from the tokens' own bytes.

What differs from the textbook: a tokenizer can tell its offsets, but following them costs it a
third of its time, and handing them over costs Python as much again. The tokens of a byte-level
vocabulary are pieces of the text: side by side they are its bytes, which is checked for every text,
and then their lengths say where each stands. Any other tokenizer is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from lora.data.tokenizers.subword import TextTokenizer

Ids = NDArray[np.int32]
Ints = NDArray[np.int64]
Places = tuple[Sequence[int] | Ints, Sequence[int] | Ints]
"""First character of each token, and the one after its last, both (n,). A character that takes
several tokens is in the place of each of them."""

_PROBE = " The  quick\n\n brown\t fox's 3.14 \n"
_IN_NO_TEXT = b"\xff"


class PlaceFinder:
    """Tokenises texts, without special tokens added, and says where their tokens stand."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        self._bytes = _TokenBytes(tokenizer.backend)
        # Some tokenizers trim spaces out of their offsets: those are asked, never computed.
        probe = self._backend.encode(_PROBE, add_special_tokens=False)
        own = self._compute(_PROBE, probe.ids, np.asarray(probe.ids, np.int32))
        self._computes = own is not None and _are_equal(own, places_of(probe.offsets))

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text for `find`, tokenised in parallel."""
        if self._computes:
            return self._tokenizer.encode_fast(texts)
        return self._encode_with_offsets(texts)

    def find(self, text: str, encoding: Encoding, ids: list[int], tokens: Ids) -> Places:
        """Return where the tokens of `text` stand: what the tokenizer's own offsets say.

        The ids of `encoding` are given too, as the list and as the array, (n,), that callers need
        anyway: each takes some time to make.
        """
        if not self._computes:
            return places_of(encoding.offsets)
        places = self._compute(text, ids, tokens)
        return places or places_of(self._encode_with_offsets([text])[0].offsets)

    def _encode_with_offsets(self, texts: Sequence[str]) -> list[Encoding]:
        return list(self._backend.encode_batch(list(texts), add_special_tokens=False))

    def _compute(self, text: str, ids: list[int], tokens: Ids) -> Places | None:
        """Return the tokens' places, or None if their bytes are not the text's."""
        data = text.encode()
        if b"".join(map(self._bytes.__getitem__, ids)) != data:
            return None
        lengths = self._bytes.lengths[tokens]
        ends = lengths.cumsum()  # in bytes, (n,)
        starts = ends - lengths
        if len(data) == len(text):
            return starts, ends
        begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # a character's first byte
        before = np.concatenate([[0], np.cumsum(begins)])  # characters begun before each byte
        return before[starts + 1] - 1, before[ends]


def places_of(offsets: Sequence[tuple[int, int]]) -> Places:
    """Return a tokenizer's offsets as two lists, beginnings and ends."""
    return [start for start, _ in offsets], [end for _, end in offsets]


def _are_equal(one: Places, other: Places) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


class _TokenBytes(dict[int, bytes]):
    """The text's bytes that a token of a byte-level vocabulary stands for, by id, on demand."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        self._backend = backend
        added = backend.get_added_tokens_decoder().items()
        self._added = {number: token.content for number, token in added}
        self._alphabet = {letter: byte for byte, letter in enumerate(byte_letters())}
        self.lengths: Ints = np.zeros(0, np.int64)
        """Bytes of each token met so far, by id."""

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
    """Return the character that byte-level vocabularies write for each byte, by the byte.

    Printable bytes stand for themselves; the others are the characters from 256 on, in order
    (the alphabet of GPT-2's vocabulary).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
