import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from lora.data.tokenizers.offsets import OffsetFinder, as_token_offsets, byte_letters
from lora.data.tokenizers.subword import TextTokenizer

PIECES = st.sampled_from(
    ["The dog", " é", "e\u0301", "世界", "😀", "👩‍👧", "<|im_end|>", "<|im_start|>", "\n\n", "  "]
)
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=20).map("".join)


def check(finder: OffsetFinder, tokenizer: TextTokenizer, text: str) -> None:
    """Compare the offsets found with the tokenizer's own offsets."""
    (encoding,) = finder.encode([text])
    tokens = np.asarray(encoding.ids, np.int32)
    starts, ends = finder.find(text, encoding, encoding.ids, tokens)
    own = tokenizer.backend.encode(text, add_special_tokens=False)
    assert encoding.ids == own.ids
    assert list(zip(list(starts), list(ends), strict=True)) == own.offsets


def test_byte_letters_are_the_alphabet_of_the_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert len(byte_letters()) == 256
    assert set(byte_letters()) == set(ByteLevel.alphabet())
    assert byte_letters()[ord(" ")] == "Ġ"


@given(text=TEXTS)
def test_toy_offsets_are_the_tokenizers_own(tokenizer: TextTokenizer, text: str) -> None:
    check(OffsetFinder(tokenizer), tokenizer, text)


@given(text=TEXTS)
def test_offsets_of_one_that_trims_spaces_are_its_own(
    bos_tokenizer: TextTokenizer, text: str
) -> None:
    check(OffsetFinder(bos_tokenizer), bos_tokenizer, text)


@given(text=TEXTS)
def test_offsets_of_one_with_spaces_put_in_front_are_its_own(
    sentencepiece: Tokenizer, text: str
) -> None:
    tokenizer = TextTokenizer(sentencepiece)
    check(OffsetFinder(tokenizer), tokenizer, text)


@given(text=TEXTS)
def test_offsets_in_text_that_is_normalised_are_the_tokenizers_own(
    tokenizer: TextTokenizer, text: str
) -> None:
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.normalizer = normalizers.NFC()
    normalising = TextTokenizer(backend)
    check(OffsetFinder(normalising), normalising, text)


@pytest.fixture(scope="module")
def smollm2_finder(smollm2_tokenizer: TextTokenizer) -> OffsetFinder:
    return OffsetFinder(smollm2_tokenizer)


@given(text=TEXTS)
def test_real_offsets_are_the_tokenizers_own(
    smollm2_tokenizer: TextTokenizer, smollm2_finder: OffsetFinder, text: str
) -> None:
    check(smollm2_finder, smollm2_tokenizer, text)


def test_byte_level_offsets_are_computed(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = OffsetFinder(tokenizer)
    monkeypatch.setattr(
        TextTokenizer, "encode_with_offsets", lambda self, texts: pytest.fail("asked")
    )
    check(finder, tokenizer, "The dog is a café — 世界 😀<|im_end|>\n")


def test_offsets_of_no_tokens() -> None:
    assert as_token_offsets([]) == ([], [])
    assert as_token_offsets([(0, 2), (1, 5)]) == ([0, 1], [2, 5])
