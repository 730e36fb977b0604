"""The tokenizer inside a GGUF file's metadata, as one of the `tokenizers` library.

Source of the keys: the GGUF specification, `tokenizer.ggml.*` and `tokenizer.chat_template`.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lora.data.tokenizers import TextTokenizer, find_stop_ids
from lora.errors import DataError, did_you_mean

_CONTROL, _USER_DEFINED, _UNKNOWN, _BYTE = 3, 4, 2, 6  # values of tokenizer.ggml.token_type
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

# Where words may end in byte-level BPE, by the names of `tokenizer.ggml.pre`. The patterns are
# facts of the models that were trained with them.
_GPT2 = ("default", "gpt-2", "gpt2")
_DIGITS_ALONE = ("smollm", "refact", "starcoder")
_WORDS = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def build_gguf_tokenizer(metadata: dict[str, Any]) -> TextTokenizer:
    """Return the tokenizer that GGUF `metadata` (key to plain value) describes.

    Byte-level BPE (`gpt2`) with the known word patterns, and SentencePiece's BPE (`llama`). Raises
    DataError for other kinds and for metadata that contradicts itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise DataError("The GGUF file has no list of tokens (tokenizer.ggml.tokens): use another.")
    if kind == "gpt2":
        backend = _byte_level(tokens, metadata)
    elif kind == "llama":
        backend = _sentence_piece(tokens, metadata)
    else:
        raise DataError(
            f"tokenizer.ggml.model is {kind!r}: allowed are 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece). Use the model's Hugging Face folder instead."
        )
    _add_special(backend, tokens, metadata.get("tokenizer.ggml.token_type"))
    named = {name: _named(metadata, name, tokens) for name in ("bos", "eos", "padding")}
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    return TextTokenizer(
        backend=backend,
        bos_token=named["bos"],
        eos_token=named["eos"],
        pad_token=named["padding"],
        chat_template=template,
        stop_ids=find_stop_ids(backend, named["eos"], template),
    )


def _byte_level(tokens: list[str], metadata: dict[str, Any]) -> Tokenizer:
    pairs = metadata.get("tokenizer.ggml.merges") or []
    merges = [tuple(pair.split(" ", 1)) for pair in pairs]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    faulty = next((m for m in merges if len(m) != 2 or not set(m) <= vocabulary.keys()), None)
    if faulty is not None:
        raise DataError(f"tokenizer.ggml.merges joins {faulty!r}, which are no two tokens.")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = _word_pattern(str(metadata.get("tokenizer.ggml.pre", "default")))
    backend.decoder = decoders.ByteLevel()
    return backend


def _word_pattern(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _DIGITS_ALONE:
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([digits, words])
    if name in _WORDS:
        split = pre_tokenizers.Split(Regex(_WORDS[name]), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, plain])
    known = (*_GPT2, *_DIGITS_ALONE, *_WORDS)
    raise DataError(
        f"tokenizer.ggml.pre is {name!r}: known are {', '.join(known)}.{did_you_mean(name, known)} "
        "Use the model's Hugging Face folder instead."
    )


def _sentence_piece(tokens: list[str], metadata: dict[str, Any]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise DataError("tokenizer.ggml.scores must give one number for each token.")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = tokens[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    merges = _merges_from_scores(vocabulary, scores)
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_from_scores(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return BPE merges: SentencePiece joins the pair whose result has the highest score first."""
    merges = []
    for token, number in vocabulary.items():
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            if left in vocabulary and right in vocabulary:
                order = (-scores[number], vocabulary[left], vocabulary[right])
                merges.append((order, (left, right)))
    merges.sort(key=lambda merge: merge[0])
    return [pair for _, pair in merges]


def _add_special(backend: Tokenizer, tokens: list[str], kinds: Any) -> None:
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        return
    control = [t for t, k in zip(tokens, kinds, strict=True) if k in (_CONTROL, _UNKNOWN)]
    own = [t for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in own])


def _named(metadata: dict[str, Any], name: str, tokens: list[str]) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise DataError(f"tokenizer.ggml.{name}_token_id is {number!r}, and no token's number.")
    return tokens[number]
