"""Tokenizers as GGUF metadata: there and back the same, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError
from lora.pretrained.gguf_tokenizer import WORD_RULES, build_gguf_tokenizer
from lora.pretrained.gguf_vocabulary import describe_tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
TEXTS = [
    "the cat sat on the mat, and the other cat didn't: 12345 times!",
    "def f(x):\n    return x ** 2\n\n\n",
    "naïve café 日本語 🙂 e\u0301",
    "   spaces   ",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
Change = Callable[[Tokenizer], None]


def byte_level(change: Change | None = None, **named: Any) -> TextTokenizer:
    """Return a small SmolLM-like tokenizer, changed by `change` at the end."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if change is not None:
        change(backend)
    named = {"eos_token": "<|im_end|>", "stop_ids": (2,)} | named
    return TextTokenizer(backend, **named)


def pieces(
    prefix: bool,
    change: Change | None = None,
    first: tuple[tuple[str, str], ...] = (),
    last: tuple[tuple[str, str], ...] = (),
) -> TextTokenizer:
    """Return a small tokenizer like Llama 2's (with a prefix) or Gemma's (without)."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{n:02X}>": 3 + n for n in range(256)}
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz,.:"]
    merges = [*first, ("t", "h"), ("th", "e"), (SPACE, "the"), ("c", "a"), ("a", "t"), (SPACE, "c")]
    merges += [("ca", "t"), (SPACE, "cat"), (SPACE + "c", "at"), ("c", "at")]
    merges += [(SPACE + "c", "a"), (SPACE + "ca", "t"), (SPACE, "th"), (SPACE + "th", "e")]
    merges += [(SPACE, "t"), (SPACE + "t", "h"), ("h", "e"), ("t", "he"), (SPACE + "t", "he")]
    merges += [(SPACE, "ca"), *last]
    order = list(dict.fromkeys("".join(pair) for pair in merges))
    merges.sort(key=lambda pair: order.index("".join(pair)))
    for token in (*letters, *order):
        vocabulary.setdefault(token, len(vocabulary))
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        ["<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    if change is not None:
        change(backend)
    return TextTokenizer(backend, bos_token="<s>", eos_token="</s>", stop_ids=(2,))


def assert_same(tokenizer: TextTokenizer, again: TextTokenizer) -> None:
    assert again.vocab_size == tokenizer.vocab_size
    for text in (*TEXTS, "a<|im_end|>b<tool>"):
        for adds in (False, True):
            ids = tokenizer.encode(text, add_special_tokens=adds)
            assert again.encode(text, add_special_tokens=adds) == ids
            for skips in (False, True):
                assert again.decode(ids, skip_special_tokens=skips) == tokenizer.decode(
                    ids, skip_special_tokens=skips
                )


def test_a_byte_level_tokenizer_comes_back() -> None:
    tokenizer = byte_level(
        bos_token="<|im_start|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    metadata = describe_tokenizer(tokenizer, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert metadata["tokenizer.ggml.token_type"][-1] == 4
    again = build_gguf_tokenizer(metadata)
    assert_same(tokenizer, again)
    for name in ("bos_token", "eos_token", "pad_token", "chat_template", "stop_ids"):
        assert getattr(again, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("name", list(WORD_RULES))
def test_every_known_word_pattern_comes_back(name: str) -> None:
    metadata = describe_tokenizer(byte_level(), 400)
    metadata["tokenizer.ggml.pre"] = name
    tokenizer = build_gguf_tokenizer(metadata)
    again = describe_tokenizer(tokenizer, 400)
    assert WORD_RULES[again["tokenizer.ggml.pre"]] == WORD_RULES[name]
    assert_same(tokenizer, build_gguf_tokenizer(again))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentence_piece_tokenizer_comes_back(prefix: bool) -> None:
    tokenizer = pieces(prefix)
    metadata = describe_tokenizer(tokenizer, tokenizer.vocab_size)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert_same(tokenizer, build_gguf_tokenizer(metadata))


def test_runs_of_spaces_that_are_tokens_of_their_own_come_back() -> None:
    def add_runs(backend: Tokenizer) -> None:
        backend.add_tokens([AddedToken(SPACE * 2, special=False, normalized=False)])

    tokenizer = pieces(False, add_runs, first=((SPACE, SPACE),))
    metadata = describe_tokenizer(tokenizer, tokenizer.vocab_size)
    assert "  " in metadata["tokenizer.ggml.tokens"]
    again = build_gguf_tokenizer(metadata)
    for text in ("the  cat", "  ", "   the"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text
    late = pieces(False, add_runs, last=((SPACE, SPACE),))  # words join before runs of spaces do
    with pytest.raises(DataError, match="would be tokenised differently"):
        describe_tokenizer(late, late.vocab_size)


def test_rows_without_a_token_get_placeholders_that_are_removed_again() -> None:
    tokenizer = byte_level()
    size = tokenizer.vocab_size
    metadata = describe_tokenizer(tokenizer, size + 3)
    assert metadata["tokenizer.ggml.tokens"][size:] == [f"[PAD{size + n}]" for n in range(3)]
    assert metadata["tokenizer.ggml.token_type"][size:] == [5, 5, 5]
    assert build_gguf_tokenizer(metadata).vocab_size == size


def test_bos_and_eos_that_the_tokenizer_adds_come_back() -> None:
    def add_both(backend: Tokenizer) -> None:
        backend.post_processor = processors.TemplateProcessing(
            ["<|im_start|>", "$A", "<|im_end|>"],
            special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
        )

    metadata = describe_tokenizer(byte_level(add_both, bos_token="<|im_start|>"), 400)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is True


def test_further_stops_come_back() -> None:
    tokenizer = byte_level(eos_token="<|endoftext|>", stop_ids=(0, 2, 7), chat_template=TEMPLATE)
    metadata = describe_tokenizer(tokenizer, 400)
    assert metadata["tokenizer.ggml.eos_token_id"] == 0
    assert build_gguf_tokenizer(metadata).stop_ids == (0, 2, 7)
    with pytest.raises(DataError, match=r"stop_ids would be .* instead of"):
        describe_tokenizer(byte_level(stop_ids=(2, 5, 6, 7)), 400)


def _set(name: str, value: Any) -> Change:
    return lambda backend: setattr(backend, name, value)


def _add(token: str, **flags: Any) -> Change:
    return lambda backend: backend.add_tokens([AddedToken(token, **flags)]) and None


_GPT4 = pre_tokenizers.Split(Regex(r"\w+|\W+"), behavior="isolated")
REFUSED: dict[str, tuple[Change, str]] = {
    "a prefix space": (
        _set("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "have no name in GGUF",
    ),
    "an unknown pattern": (
        _set(
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [_GPT4, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            ),
        ),
        r"word pattern '\\\\w",
    ),
    "two patterns": (
        _set(
            "pre_tokenizer",
            pre_tokenizers.Sequence([_GPT4, pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        ),
        "several patterns",
    ),
    "another step": (_set("pre_tokenizer", pre_tokenizers.Whitespace()), "Whitespace"),
    "lower case": (_set("normalizer", normalizers.Lowercase()), "Lowercase"),
    "a form without a name": (_set("normalizer", normalizers.NFC()), "has no name in GGUF"),
    "a greedy token": (_add("<mask>", lstrip=True), "'<mask>' strips the spaces"),
    "more at the ends": (
        _set(
            "post_processor",
            processors.TemplateProcessing(
                ["<|endoftext|>", "<|im_start|>", "$A"],
                special_tokens=[("<|endoftext|>", 0), ("<|im_start|>", 1)],
            ),
        ),
        "adds more than one token before",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_the_format_cannot_hold(case: str) -> None:
    change, words = REFUSED[case]
    with pytest.raises(DataError, match=words) as caught:
        describe_tokenizer(byte_level(change, bos_token="<|im_start|>"), 400)
    assert "Keep the model as a Hugging Face folder" in str(caught.value)


def test_other_models_are_refused() -> None:
    words = TextTokenizer(Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")))
    with pytest.raises(DataError, match="its model is WordLevel"):
        describe_tokenizer(words, 2)


def test_more_tokens_than_rows() -> None:
    tokenizer = byte_level()
    with pytest.raises(DataError, match=f"{tokenizer.vocab_size} tokens, the embedding 10 rows"):
        describe_tokenizer(tokenizer, 10)


def test_other_handling_of_spaces_is_refused() -> None:
    change = _set("pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="first"))
    with pytest.raises(DataError, match="does not treat spaces"):
        describe_tokenizer(pieces(True, change), 400)


def test_merges_that_scores_cannot_give_are_refused() -> None:
    """The token "abc" is made of "ab" and "c" only; scores would make it of "a" and "bc" too."""

    def take_one_way(backend: Tokenizer) -> None:
        parts = json.loads(backend.to_str())
        vocabulary = parts["model"]["vocab"]
        for token in ("qu", "ick", "quick", "ic", "ck"):
            vocabulary.setdefault(token, len(vocabulary))
        parts["model"]["merges"] += [["q", "u"], ["i", "c"], ["c", "k"], ["ic", "k"]]
        backend.__setstate__(json.dumps(parts).encode())

    with pytest.raises(DataError, match="would be tokenised differently"):
        describe_tokenizer(pieces(True, take_one_way), 400)
