"""Tokenizers converted to GGUF metadata: the inverse of `lora.pretrained.gguf_tokenizer`.

The format holds a vocabulary, merges or scores, and the name of a known word pattern, whereas
tokenizer.json can hold any pipeline. A tokenizer that does not fit is refused; one that fits is
rebuilt from the metadata and compared.
"""

from __future__ import annotations

import json
from typing import Any

from lora.data.tokenizers.subword import TextTokenizer
from lora.errors import DataError
from lora.pretrained.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORD_RULES,
    build_gguf_tokenizer,
    padding_token,
)

_PROBES = (
    "The quick brown fox doesn't jump; it's 3.14 times too lazy, I'LL say.",
    "def f(x):\n    return x ** 2  # squared\n\n\n\tif x:\r\n        pass",
    "naïve café — “quoted” … Ω≈ç√∫ 日本語テスト 한국어 עברית العربية हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u00a0 1234567890 ½ Ⅷ camelCaseWORDS_and_snake",
    "   leading,  double   and trailing   ",
)
_SPACES_SEQUENCE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREFIX = {"type": "Prepend", "prepend": SPACE}
_PROBE_TOKENS = 4000  # evenly spaced tokens of the vocabulary that are decoded into a probe


def describe_tokenizer(tokenizer: TextTokenizer, n_rows: int) -> dict[str, Any]:
    """Return the metadata of a GGUF file for `tokenizer`, key to plain value.

    `n_rows` is the number of the model's embedding rows: those without a token get placeholders,
    as the format requires. Raises DataError for a tokenizer that the format cannot represent, or
    that would differ when read back.
    """
    parts = json.loads(tokenizer.backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
        raise _unfit(f"its model is {model['type']}; only plain BPE is supported")
    if model.get("end_of_word_suffix") or model.get("dropout"):
        raise _unfit("it marks word ends, or has BPE dropout")
    for token in parts["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _unfit(f"its token {token['content']!r} strips the spaces around it")
    tokens, kinds = _list_tokens(tokenizer, parts, n_rows)
    if model.get("byte_fallback"):
        own = _sentence_piece(tokens, kinds, parts)
    else:
        own = _byte_level(parts)
    metadata = {
        **own,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        **_ends(tokenizer),
    }
    _compare(tokenizer, build_gguf_tokenizer(metadata))
    return metadata


def _unfit(why: str) -> DataError:
    return DataError(
        f"Cannot write the tokenizer to a GGUF file: {why}. Keep the model as a Hugging Face "
        "folder."
    )


def _list_tokens(
    tokenizer: TextTokenizer, parts: dict[str, Any], n_rows: int
) -> tuple[list[str], list[int]]:
    """Return tokens and their kinds by id, filled up to `n_rows`."""
    by_number = {n: token for token, n in tokenizer.backend.get_vocab().items()}
    if max(by_number) >= n_rows:
        raise _unfit(f"it has {max(by_number) + 1:,} tokens, the embedding {n_rows:,} rows")
    added = {token["id"]: token["special"] for token in parts["added_tokens"]}
    has_bytes, unknown = parts["model"].get("byte_fallback"), parts["model"].get("unk_token")
    tokens, kinds = [], []
    for number in range(n_rows):
        token = by_number.get(number, padding_token(number))
        kind = NORMAL if number in by_number else UNUSED
        if number in added:
            kind = CONTROL if added[number] else USER_DEFINED
        if has_bytes and len(token) == 6 and token.startswith("<0x"):
            kind = BYTE
        if token == unknown:
            kind = UNKNOWN
        if has_bytes and kind == USER_DEFINED and not token.strip(SPACE):
            token = token.replace(SPACE, " ")  # matched in the text before spaces are replaced
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _byte_level(parts: dict[str, Any]) -> dict[str, Any]:
    steps = _flatten(parts["pre_tokenizer"], "pretokenizers")
    normal = [step["type"] for step in _flatten(parts["normalizer"], "normalizers")]
    digits = {"type": "Digits", "individual_digits": True} in steps
    splits = [step for step in steps if step["type"] == "Split"]
    last = steps[-1] if steps else {}
    isolated = all(s["behavior"] == "Isolated" and not s["invert"] for s in splits)
    known = 1 + digits + len(splits) == len(steps) and last.get("type") == "ByteLevel"
    if not known or not isolated or last["add_prefix_space"] or normal not in ([], ["NFC"]):
        raise _unfit(f"its steps {[s['type'] for s in steps]} after {normal} have no name in GGUF")
    if last["use_regex"] == bool(splits) or len(splits) > 1:
        raise _unfit("it splits words by several patterns")
    pattern = splits[0]["pattern"].get("Regex") if splits else None
    seen = (pattern, digits, bool(parts["model"].get("ignore_merges")), bool(normal))
    for name, rule in WORD_RULES.items():
        if name == "default":  # its meaning depends on the reader
            continue
        if seen == (rule.pattern, rule.digits_alone, rule.ignore_merges, rule.normal_form):
            return {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": name,
                "tokenizer.ggml.merges": [" ".join(pair) for pair in parts["model"]["merges"]],
            }
    raise _unfit(f"its word pattern {pattern!r} has no name in GGUF")


def _sentence_piece(tokens: list[str], kinds: list[int], parts: dict[str, Any]) -> dict[str, Any]:
    normal = _flatten(parts["normalizer"], "normalizers")
    before = _flatten(parts["pre_tokenizer"], "pretokenizers")
    # Gemma's pre-tokenizer splits at spaces, but its normalizer has replaced them all.
    has_prefix = normal[:1] == [_PREFIX]
    is_known = normal[has_prefix:] == [_SPACES_SEQUENCE]
    if not is_known or any(s.get("pattern") != {"String": " "} for s in before):
        raise _unfit("it does not treat spaces as SentencePiece's BPE does")
    # A token ranks by the first merge that produces it; single characters come last.
    rank: dict[str, int] = {}
    for number, pair in enumerate(parts["model"]["merges"]):
        rank.setdefault("".join(pair), number)
    last = len(parts["model"]["merges"])
    scores = [-float(rank.get(token, last)) for token in tokens]
    unknown = parts["model"].get("unk_token")
    own: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [
            0.0 if k != NORMAL else s for s, k in zip(scores, kinds, strict=True)
        ],
        "tokenizer.ggml.add_space_prefix": has_prefix,
    }
    if unknown is not None:
        own["tokenizer.ggml.unknown_token_id"] = tokens.index(unknown)
    return own


def _flatten(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[name] for inner in _flatten(part, name)]
    return [step]


def _ends(tokenizer: TextTokenizer) -> dict[str, Any]:
    plain, whole = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=True)
    before = whole[:1] == [tokenizer.bos_id] and whole != plain
    after = whole[before:] == [*plain, tokenizer.eos_id]
    if whole[before : len(whole) - after] != plain:
        raise _unfit("it adds more than one token before and one after a text")
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    ids |= dict(zip(("eot", "eom"), _other_stops(tokenizer), strict=False))
    own: dict[str, Any] = {
        f"tokenizer.ggml.{k}_token_id": n for k, n in ids.items() if n is not None
    }
    own |= {"tokenizer.ggml.add_bos_token": before, "tokenizer.ggml.add_eos_token": after}
    if tokenizer.chat_template is not None:
        own["tokenizer.chat_template"] = tokenizer.chat_template
    return own


def _other_stops(tokenizer: TextTokenizer) -> list[int]:
    """Return the stop ids other than end-of-text, those in the template last."""
    template = tokenizer.chat_template or ""
    others = [n for n in tokenizer.stop_ids if n != tokenizer.eos_id]
    return sorted(others, key=lambda n: (tokenizer.backend.id_to_token(n) or "") in template)


def _compare(tokenizer: TextTokenizer, again: TextTokenizer) -> None:
    """Raise DataError if `again`, read back, differs from `tokenizer`."""
    for name in ("bos_id", "eos_id", "pad_id", "stop_ids", "chat_template"):
        wanted, seen = getattr(tokenizer, name), getattr(again, name)
        if wanted != seen:
            raise _unfit(f"its {name} would be {seen!r} instead of {wanted!r} when read back")
    for text in _probes(tokenizer):
        for adds in (False, True):
            wanted = tokenizer.encode(text, add_special_tokens=adds)
            seen = again.encode(text, add_special_tokens=adds)
            if wanted != seen:
                pairs = enumerate(zip(wanted, seen, strict=False))
                same = next((n for n, (one, other) in pairs if one != other), 0)
                near = tokenizer.decode(wanted[max(0, same - 3) : same + 3])
                raise _unfit(f"{near!r} would be tokenised differently")
            if tokenizer.decode(wanted) != again.decode(seen):
                raise _unfit(f"{text[:40]!r} would be decoded differently")


def _probes(tokenizer: TextTokenizer) -> list[str]:
    every = max(1, tokenizer.vocab_size // _PROBE_TOKENS)
    tokens = tokenizer.decode(range(0, tokenizer.vocab_size, every))
    added = tokenizer.backend.get_added_tokens_decoder().values()
    special = "a".join(token.content.replace(SPACE, " ") for token in added)
    return [*_PROBES, tokens, tokens.replace(" ", "  "), special, tokenizer.chat_template or ""]
