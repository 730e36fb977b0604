"""Tokenizers built from a GGUF file's metadata, for the `tokenizers` library.

Source of the keys: the GGUF specification, `tokenizer.ggml.*` and `tokenizer.chat_template`. The
meaning of the names in `tokenizer.ggml.pre` and of missing keys: llama.cpp; where it differs from
the tokenizers that the models were trained with (it never normalises), those are followed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from lora.data.tokenizers.subword import TextTokenizer, find_stop_ids
from lora.errors import DataError, did_you_mean

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@dataclass(frozen=True)
class WordRule:
    """How byte-level BPE splits text into words, and related settings."""

    pattern: str | None = None
    """None: GPT-2's own."""
    digits_alone: bool = False
    ignore_merges: bool = False
    """A word that is a token becomes that token, whatever the merges would give."""
    add_bos: bool = False
    """Default where a file lacks tokenizer.ggml.add_bos_token."""
    normal_form: bool = False
    """Normalise to Unicode's form C first."""


_LLAMA3 = _ENGLISH + r"|\p{N}{1,3}" + _ENDS
_QWEN2 = WordRule(_ENGLISH + r"|\p{N}" + _ENDS, normal_form=True)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORD_RULES: dict[str, WordRule] = {
    "default": WordRule(),
    "gpt-2": WordRule(),
    "gpt2": WordRule(),
    "smollm": WordRule(digits_alone=True),
    "starcoder": WordRule(digits_alone=True),
    "refact": WordRule(digits_alone=True),
    "llama-bpe": WordRule(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": WordRule(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": WordRule(_LLAMA3, ignore_merges=True, add_bos=True),
    "smaug-bpe": WordRule(_LLAMA3),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": WordRule(_TEKKEN, ignore_merges=True, add_bos=True),
}
"""By tokenizer.ggml.pre. The patterns are those that the models were trained with."""


def build_gguf_tokenizer(metadata: dict[str, Any]) -> TextTokenizer:
    """Return the tokenizer that GGUF `metadata` (key to plain value) describes.

    Byte-level BPE (`gpt2`) with the known word patterns, and SentencePiece's BPE (`llama`). Raises
    DataError for other kinds and for metadata that contradicts itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _tokens(metadata)
    kinds = _per_token(metadata, "token_type", len(tokens)) or [NORMAL] * len(tokens)
    tokens, kinds = _without_padding(tokens, kinds)
    if kind == "gpt2":
        words = _find_words(metadata)
        backend, adds_bos = _byte_level(tokens, metadata, words), words.add_bos
    elif kind == "llama":
        backend, adds_bos = _sentence_piece(tokens, kinds, metadata), True
    else:
        raise DataError(
            f"tokenizer.ggml.model is {kind!r}. Allowed: 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece). Use the model's Hugging Face folder instead."
        )
    _add_special(backend, tokens, kinds)
    names = ("bos", "eos", "padding", "eot", "eom")
    named = {name: _named(metadata, name, tokens) for name in names}
    _add_ends(backend, metadata, named, adds_bos)
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    ends = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eot", "eom") if named[name]]
    return TextTokenizer(
        backend=backend,
        bos_token=named["bos"],
        eos_token=named["eos"],
        pad_token=named["padding"],
        chat_template=template,
        stop_ids=find_stop_ids(backend, named["eos"], template, ends),
    )


def find_fault(text: str) -> str | None:
    """Build the tokenizer of metadata in JSON; what the library does then is seen from outside."""
    try:
        build_gguf_tokenizer(json.loads(text)).backend.to_str()
    except Exception as error:
        if not is_ordinary(error):
            raise
    return None  # an ordinary error is raised again where the file is converted


def is_ordinary(error: Exception) -> bool:
    """Whether it is an error of ours, or the library's about a value that it cannot use."""
    return type(error) is Exception or isinstance(error, DataError | ValueError | TypeError)


def _tokens(metadata: dict[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise DataError("tokenizer.ggml.tokens is not a list of strings. Use another file.")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise DataError(f"tokenizer.ggml.tokens has {twice!r} twice. Copy the file again.")
    return tokens


def _per_token(metadata: dict[str, Any], name: str, n_tokens: int) -> list[Any] | None:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None or (isinstance(values, list) and len(values) == n_tokens):
        return values
    seen = f"has {len(values)} values" if isinstance(values, list) else f"is {values!r}"
    raise DataError(f"tokenizer.ggml.{name} {seen}: {n_tokens} are needed, one per token.")


def padding_token(token_id: int) -> str:
    """Return the placeholder in a file for an embedding row without a token."""
    return f"[PAD{token_id}]"


def _without_padding(tokens: list[str], kinds: list[int]) -> tuple[list[str], list[int]]:
    end = len(tokens)
    while end and kinds[end - 1] == UNUSED and tokens[end - 1] == padding_token(end - 1):
        end -= 1
    return tokens[:end], kinds[:end]


def _find_words(metadata: dict[str, Any]) -> WordRule:
    # In files older than the key, only Qwen's pattern is certain.
    is_qwen = str(metadata.get("general.architecture")).startswith("qwen")
    name = str(metadata.get("tokenizer.ggml.pre", "qwen2" if is_qwen else "default"))
    if name not in WORD_RULES:
        raise DataError(
            f"tokenizer.ggml.pre is {name!r}. Allowed: {', '.join(WORD_RULES)}."
            f"{did_you_mean(name, WORD_RULES)} Use the model's Hugging Face folder instead."
        )
    return WORD_RULES[name]


def _byte_level(tokens: list[str], metadata: dict[str, Any], words: WordRule) -> Tokenizer:
    pairs = metadata.get("tokenizer.ggml.merges")
    if not isinstance(pairs, list) or not all(isinstance(pair, str) for pair in pairs):
        raise DataError("tokenizer.ggml.merges is not a list of pairs. Use another file.")
    merges = [tuple(pair.split(" ", 1)) for pair in pairs]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise DataError(
                f"tokenizer.ggml.merges has {merge!r}, which does not merge two tokens into one."
            )
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.ignore_merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(words)
    backend.decoder = decoders.ByteLevel()
    if words.normal_form:
        backend.normalizer = normalizers.NFC()
    return backend


def _pre_tokenizer(words: WordRule) -> pre_tokenizers.PreTokenizer:
    own = words.pattern is None
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    if words.pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(words.pattern), behavior="isolated"))
    if words.digits_alone:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence(steps)


def _sentence_piece(tokens: list[str], kinds: list[int], metadata: dict[str, Any]) -> Tokenizer:
    scores = _per_token(metadata, "scores", len(metadata["tokenizer.ggml.tokens"]))
    if scores is None:
        raise DataError("tokenizer.ggml.scores is missing. SentencePiece needs them.")
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.get(f"tokenizer.ggml.{key}"):
            raise DataError(
                f"tokenizer.ggml.{key} is set: this normalisation is not supported. Use the "
                "model's Hugging Face folder instead."
            )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = _merges_from_scores(tokens, kinds, scores[: len(tokens)])
    unknown = _named(metadata, "unknown", tokens)
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_from_scores(
    tokens: list[str], kinds: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """Return BPE merges in SentencePiece's order: highest score of the merged token first."""
    pieces = {t: n for n, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k == NORMAL}
    merges = []
    for token, number in pieces.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                order = (-scores[number], number, pieces[left], pieces[right])
                merges.append((order, (left, right)))
    merges.sort(key=lambda merge: merge[0])
    return [pair for _, pair in merges]


def _add_special(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    control = [t for t, k in zip(tokens, kinds, strict=True) if k in (CONTROL, UNKNOWN)]
    own = [t for t, k in zip(tokens, kinds, strict=True) if k == USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in own])


def _add_ends(
    backend: Tokenizer, metadata: dict[str, Any], named: dict[str, str | None], adds_bos: bool
) -> None:
    """Set the tokens that `add_special_tokens=True` adds before and after a text."""
    with_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    bos = named["bos"] if with_bos else None
    eos = named["eos"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    ends = [token for token in (bos, eos) if token is not None]
    if ends:
        whole = [token for token in (bos, "$A", eos) if token is not None]
        numbers = [(token, backend.token_to_id(token)) for token in dict.fromkeys(ends)]
        backend.post_processor = processors.TemplateProcessing(whole, special_tokens=numbers)


def _named(metadata: dict[str, Any], name: str, tokens: list[str]) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise DataError(f"tokenizer.ggml.{name}_token_id is {number!r}, which is not a token id.")
    return tokens[number]
