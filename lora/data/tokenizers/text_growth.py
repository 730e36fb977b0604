"""How much longer a tokenizer's normalizers, or its decoders, can make a text: an upper bound.

Forty normalizers that each replace "a" with "aa" turn one letter into a terabyte, and the library
that applies them aborts the process when memory ends. The bound is computed from the last step to
the first: the weight of a character is the most characters that it can become in the steps to come.
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

import regex

MAX_GROWTH = 64.0
"""Characters that one character may become; released tokenizers stay below 20."""
MAX_STEPS = 250
_MAX_PREFIX = 4096.0
_MAX_CHARSMAP_BYTES = 64
_SAMPLE = " aeiouAEIOUéü0.,\n\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{GRINNING FACE}\ufdfa\ufb03"
_UNICODE = {"NFC", "NFD", "NFKC", "NFKD"}
_ASSERTIONS = regex.compile(r"\(\?|\\[bBAzZGKm]|[$^]")

Weight = Callable[[str], float]
Step = dict[str, Any]


def why_it_grows(steps: Any, what: str) -> str | None:
    """Return why a text could grow without bound in `steps`, a part of tokenizer.json, or None."""
    flat = list(_flatten(steps, 0))
    if not flat:
        return None
    if len(flat) > MAX_STEPS:
        return f"it has {len(flat):,} {what}s; at most {MAX_STEPS} are allowed"
    weight: Weight = _one
    letters, prefix = (
        {*_SAMPLE, *(c for step in flat for c in _pattern(step) + _content(step))},
        0.0,
    )
    for number, step in reversed(list(enumerate(flat))):
        fault, added = _charsmap_fault(step, flat[number + 1 :]), step.get("prepend")
        if fault:
            return fault
        if isinstance(added, str):
            prefix += _total(added, weight)
        weight = _remembered(_before(step, weight))
        growth = max(map(weight, letters))  # at each step, so that no call is deep
    if growth > MAX_GROWTH or prefix > _MAX_PREFIX:
        seen = min(max(growth, prefix), 1e99)
        return (
            f"its {what}s can make a text {seen:,.4g} times as long; at most {MAX_GROWTH:.0f} "
            "times is allowed"
        )
    return None


def _flatten(steps: Any, depth: int) -> Iterable[Step]:
    if not isinstance(steps, dict) or depth > MAX_STEPS:
        return
    lists = [steps.get(key) for key in ("normalizers", "decoders")]
    inner = [step for steps in lists if isinstance(steps, list) for step in steps]
    if inner:
        for step in inner:
            yield from _flatten(step, depth + 1)
    else:
        yield steps


def _before(step: Step, weight: Weight) -> Weight:
    """Return the weight of a character before `step`, given those after it."""
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "Replace" and isinstance(pattern, dict):
        size, literal = _total(_content(step), weight), pattern.get("String")
        if isinstance(literal, str) and literal:
            share, letters = size / len(literal), frozenset(literal)
            return lambda c: max(weight(c), share) if c in letters else weight(c)
        if _takes_a_character(_pattern(step)):
            return lambda c: max(weight(c), size)
        return lambda c: weight(c) + size  # it may match between any two characters
    if kind in _UNICODE:
        return lambda c: _total(unicodedata.normalize(str(kind), c), weight)  # type: ignore[arg-type]
    if kind == "Precompiled":
        return lambda c: max(weight(c), _total(unicodedata.normalize("NFKC", c), weight))
    if kind in ("Lowercase", "BertNormalizer"):
        return lambda c: max(weight(c), _total(c.lower(), weight))
    if kind == "ByteLevel":  # one of 256 letters for each byte
        most = max(weight(chr(code)) for code in (*range(0x21, 0x7F), *range(0xA1, 0x144)))
        return lambda c: len(c.encode(errors="replace")) * most
    return weight


def _takes_a_character(pattern: str) -> bool:
    """Whether each match of a regular expression has a character in it, as far as one can see."""
    if _ASSERTIONS.search(pattern):
        return False
    try:
        return regex.fullmatch(pattern, "", timeout=0.1) is None
    except (regex.error, TimeoutError, ValueError, RecursionError, OverflowError):
        return False


def _charsmap_fault(step: Step, later: list[Step]) -> str | None:
    """Return what is wrong with a map of characters to texts, sentencepiece's, or None."""
    if step.get("type") != "Precompiled":
        return None
    if any(other.get("type") == "Precompiled" for other in later):
        return "it has two precompiled normalizers; one is allowed"
    try:
        data = base64.b64decode(str(step.get("precompiled_charsmap") or ""))
    except (binascii.Error, ValueError):
        return None  # the library says so itself
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    longest = max(map(len, texts.split(b"\0")))
    if longest > _MAX_CHARSMAP_BYTES:
        return (
            f"its precompiled normalizer replaces a character with {longest:,} bytes; at most "
            f"{_MAX_CHARSMAP_BYTES} are allowed"
        )
    return None


def _pattern(step: Step) -> str:
    pattern = step.get("pattern")
    values = pattern.values() if isinstance(pattern, dict) else ()
    return next((value for value in values if isinstance(value, str)), "")


def _content(step: Step) -> str:
    content = step.get("content")
    return content if isinstance(content, str) else ""


def _one(character: str) -> float:
    return 1.0


def _total(text: str, weight: Weight) -> float:
    return sum(map(weight, text))


def _remembered(weight: Weight) -> Weight:
    known: dict[str, float] = {}

    def remembered(character: str) -> float:
        if character not in known:
            known[character] = weight(character)
        return known[character]

    return remembered
