from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lora.data.sequences.masks import find_targets
from lora.data.tokenizers.offsets import as_token_offsets
from lora.data.tokenizers.subword import TextTokenizer

STOPS = (9,)


def mask(text: str, spans: list[tuple[int, int]], words: list[str], ids: list[int]) -> list[int]:
    """Learned or not for tokens that are `words`; a '_' before a word is a space that its offsets
    leave out."""
    offsets, place = [], 0
    for word in words:
        trimmed = len(word) - len(word.lstrip("_"))
        offsets.append((place + trimmed, place + len(word)))
        place += len(word)
    assert place == len(text)
    return find_targets(text, spans, ids, as_token_offsets(offsets), STOPS).astype(int).tolist()


@pytest.mark.parametrize(
    ("spans", "words", "ids", "learned"),
    [
        ([(2, 4)], ["ab", "cd", "ef"], [1, 2, 3], [0, 1, 0]),
        ([(2, 4), (5, 6)], ["ab", "c", "d", "e", "f"], [1, 2, 3, 4, 5], [0, 1, 1, 0, 1]),
        # Over a border, on either side.
        ([(2, 4)], ["a", "bc", "de", "f"], [1, 2, 3, 4], [0, 1, 1, 0]),
        ([(1, 2)], ["abc", "def"], [1, 2], [1, 0]),
        # A space that the offsets leave out is no part of the token before.
        ([(2, 6)], ["ab", "_cd", "e"], [1, 2, 3], [0, 1, 1]),
        ([(0, 2)], ["ab", "_cd", "e"], [1, 2, 3], [1, 0, 0]),
        # A turn's end: in the span, right behind it, not behind something else.
        ([(2, 4)], ["ab", "c", "d", "ef"], [1, 2, 9, 3], [0, 1, 1, 0]),
        ([(2, 4)], ["ab", "cd", "e", "f"], [1, 2, 9, 3], [0, 1, 1, 0]),
        ([(2, 4)], ["ab", "cd", "e", "f"], [1, 2, 3, 9], [0, 1, 0, 0]),
        ([(0, 0)], ["ab", "cd"], [1, 2], [0, 0]),
    ],
)
def test_tokens_of_spans_are_targets(
    spans: list[tuple[int, int]], words: list[str], ids: list[int], learned: list[int]
) -> None:
    text = "".join(words).replace("_", " ")
    assert mask(text, spans, words, ids) == learned


def test_white_space_after_a_turns_end_is_not_a_target() -> None:
    assert mask("ab.\n \ncd", [(0, 6)], ["ab", ".", "\n", " \n", "cd"], [1, 9, 2, 3, 4]) == [
        *(1, 1, 0, 0, 0)
    ]
    # But it is where no turn ends, and text behind the end is.
    assert mask("ab\ncd", [(0, 3)], ["ab", "\n", "cd"], [1, 2, 3]) == [1, 1, 0]
    assert mask("ab.cd", [(0, 5)], ["ab", ".", "cd"], [1, 9, 3]) == [1, 1, 1]


texts = st.text(st.sampled_from("ab \n.éß漢🙂"), max_size=12)


def build_text(pieces: list[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """Turns between <|im_start|> and <|im_end|>, and where their contents stand."""
    text, spans = "", []
    for before, inside in pieces:
        text += before + "<|im_start|>"
        spans.append((len(text), len(text) + len(inside)))
        text += inside + "<|im_end|>"
    return text, spans


turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


@given(turns)
def test_byte_level_tokens_of_any_text_are_those_of_the_spans(
    tokenizer: TextTokenizer, bos_tokenizer: TextTokenizer, pieces: list[tuple[str, str]]
) -> None:
    text, spans = build_text(pieces)
    for any_tokenizer in (tokenizer, bos_tokenizer):
        encoded = any_tokenizer.backend.encode(text, add_special_tokens=False)
        ids, offsets = encoded.ids, encoded.offsets
        end = any_tokenizer.backend.token_to_id("<|im_end|>")
        learned = find_targets(text, spans, ids, as_token_offsets(offsets), {end})
        found = any_tokenizer.decode(
            [i for i, is_learned in zip(ids, learned, strict=True) if is_learned],
            skip_special_tokens=False,
        )
        # An empty span learns its end too, for it comes right behind it.
        assert found == "".join(inside + "<|im_end|>" for _, inside in pieces)


@given(turns)
def test_sentencepiece_tokens_of_any_text_are_those_of_the_spans(
    sentencepiece: Tokenizer, pieces: list[tuple[str, str]]
) -> None:
    text, spans = build_text(pieces)
    encoded = sentencepiece.encode(text, add_special_tokens=False)
    end = sentencepiece.token_to_id("<|im_end|>")
    learned = find_targets(text, spans, encoded.ids, as_token_offsets(encoded.offsets), {end})
    covered = {
        place
        for (first, stop), is_learned in zip(encoded.offsets, learned, strict=True)
        if is_learned
        for place in range(first, stop)
    }
    wanted = [place for a, b in spans for place in range(a, b + len("<|im_end|>"))]
    assert sorted(covered) == wanted
