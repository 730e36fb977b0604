import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.data.sequences.long_texts import SequenceCutter, cut_text
from lora.data.tokenizers.subword import TextTokenizer

# What tokenizers look at: letters of several widths, digits, signs, spaces and newlines of all
# kinds, contractions, special tokens.
SIGNS = ["//", ".", "?!", "#", "42", "_x", "😀", "<|im_end|>"]
SPACES = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\x1c", "\u2028"]
WORDS = st.sampled_from(["dog", "The", "é", "世界", "don't", "I'LL", "e\u0301", *SIGNS, *SPACES])
TEXTS = st.lists(WORDS | st.text(max_size=3), max_size=60).map("".join)
SIZES = st.integers(1, 40)


@given(TEXTS, SIZES)
def test_pieces_join_to_the_text_and_are_hardly_longer_than_asked(text: str, size: int) -> None:
    pieces = list(cut_text(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) >= size for piece in pieces[:-1])
    assert all(pieces) or text == ""


def test_pieces_of_ordinary_text_are_short() -> None:
    text = "The dog sleeps. It dreams of 3 cats,\nand of more.\n" * 400
    pieces = list(cut_text(text, 100))
    assert max(map(len, pieces)) < 150
    assert len(pieces) > len(text) // 150


@given(text=TEXTS, size=SIZES)
def test_toy_tokens_of_the_pieces_are_those_of_the_whole(
    tokenizer: TextTokenizer, text: str, size: int
) -> None:
    pieces = tokenizer.encode_fast(list(cut_text(text, size)))
    assert [i for piece in pieces for i in piece.ids] == tokenizer.encode(text)


@given(text=TEXTS, size=SIZES)
def test_real_tokens_of_the_pieces_are_those_of_the_whole(
    smollm2_tokenizer: TextTokenizer, text: str, size: int
) -> None:
    pieces = smollm2_tokenizer.encode_fast(list(cut_text(text, size)))
    assert [i for piece in pieces for i in piece.ids] == smollm2_tokenizer.encode(text)


@given(st.lists(st.integers(0, 12), max_size=12), st.integers(2, 9))
def test_sequences_are_those_of_the_whole_however_the_tokens_come(
    sizes: list[int], width: int
) -> None:
    total = sum(sizes)
    ids, is_target = np.arange(total, dtype=np.int32), np.arange(total) % 3 > 0
    cutter, done, found = SequenceCutter(width), 0, []
    for size in sizes:
        found += list(cutter.cut(ids[done : done + size], is_target[done : done + size]))
        done += size
    found.append(cutter.rest())
    assert cutter.n_tokens == total
    assert all(len(sequence) == width for sequence, _ in found[:-1])
    assert len(found[-1][0]) <= width
    targets = [found[0][0][:1], *(sequence[1:] for sequence, _ in found)]
    assert np.concatenate(targets).tolist() == ids.tolist()
    for (sequence, _), (following, _) in itertools.pairwise(found):
        assert sequence[-1] == following[0]
    for sequence, mask in found:
        assert mask.tolist() == is_target[sequence].tolist()


@pytest.mark.parametrize("n_pieces", [10, 400])
def test_cutting_holds_one_piece_and_one_sequence(n_pieces: int) -> None:
    cutter, ids = SequenceCutter(1000), np.zeros(5000, np.int32)
    tracemalloc.start()
    for _ in range(n_pieces):
        for _ in cutter.cut(ids, np.ones(5000, np.bool_)):
            pass
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 20 * ids.nbytes  # of 400 pieces: 400 times as much
