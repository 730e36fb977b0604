"""Checks of settings: each returns what is wrong with a value, in words that name its field."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, cast, get_args

from lora.errors import ConfigError, did_you_mean, gather

MAX_EPOCHS = 10**6
MAX_SEED = 2**63 - 1
MAX_COUNT = 10**9
"""Steps, tokens, sequences, ranks: more is a slip, and would only fail late."""
NF4_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Values that may share a scale in nf4, as in bitsandbytes."""
MAX_NUMBER = 1e9
"""Alphas, temperatures, gigabytes: far more than fp32 can bear or a machine has."""

_SEVERAL_NAMES = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)+")
"""A regular expression with a comma has other characters as well."""


def check(condition: bool, name: str, seen: object, allowed: str) -> list[str]:
    """Return the fault of a field unless `condition` holds; `allowed` is what it must be."""
    return [] if condition else [f"{name}={seen!r}: must be {allowed}"]


def check_counts(owner: object, least: int, *names: str) -> list[str]:
    """Return the faults of fields of `owner` that must be whole numbers from `least` on."""
    values = {name: getattr(owner, name) for name in names}
    allowed = f"an int ≥ {least} and ≤ {MAX_COUNT:,}"
    return [
        fault
        for name, value in values.items()
        for fault in check(is_int(value) and least <= value <= MAX_COUNT, name, value, allowed)
    ]


def check_positive(name: str, value: object, most: float = MAX_NUMBER) -> list[str]:
    """Return the fault of a field that must be a finite number above 0."""
    in_range = is_number(value) and 0 < value <= most  # type: ignore[operator]
    return check(in_range, name, value, f"a finite number > 0 and ≤ {most:g}")


def check_length(steps: object, epochs: object) -> list[str]:
    """Return what is wrong with the length of training: two of them, or one out of range."""
    if steps is not None and epochs is not None:
        return [f"epochs={epochs!r} together with steps={steps!r}: must be only one of them"]
    if epochs is not None:
        return check_positive("epochs", epochs, MAX_EPOCHS)
    in_range = steps is None or (is_int(steps) and 1 <= steps <= MAX_COUNT)  # type: ignore[operator]
    return check(in_range, "steps", steps, f"an int ≥ 1 and ≤ {MAX_COUNT:,}")


def check_seed(name: str, seed: object) -> list[str]:
    """Return the fault of a seed that torch would not take."""
    in_range = is_int(seed) and 0 <= seed <= MAX_SEED  # type: ignore[operator]
    return check(in_range, name, seed, "an int from 0 to 2**63 - 1")


def check_choice(name: str, seen: object, choices: object) -> list[str]:
    """Return the fault of a field that must be one of the words of a Literal."""
    words: tuple[str, ...] = get_args(choices)
    near = did_you_mean(str(seen), words)
    return check(seen in words, name, seen, f"one of {', '.join(words)}.{near}")


def refuse_other_words(name: str, seen: object, choices: object) -> None:
    """Raise ConfigError if the setting `name` is none of the words of a Literal."""
    words: tuple[str, ...] = get_args(choices)
    if seen not in words:
        near = did_you_mean(str(seen), words)
        raise ConfigError(f"Cannot use {name}={seen!r}. Allowed: {', '.join(words)}.{near}")


def pairs_of(name: str, value: object, faults: list[str]) -> list[tuple[str, Any]]:
    """Return the items of a mapping; for anything else none, after adding a fault."""
    if isinstance(value, dict):
        return list(value.items())
    faults += check(False, name, value, "a mapping of name suffixes to numbers")
    return []


def raise_if(faults: list[str], owner: object) -> None:
    """Raise ConfigError with all faults of the settings `owner`, if there are any."""
    if faults:
        kind = type(owner).__name__
        raise ConfigError(gather(faults, f"Cannot use {kind}:", "Change these settings."))


def take_paths(owner: object, *names: str) -> list[str]:
    """Changes `owner` in place: a path that is given as a string becomes a Path."""
    faults: list[str] = []
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, str):
            object.__setattr__(owner, name, Path(value))
        elif value is not None:
            faults += check(isinstance(value, Path), name, value, "a path")
    return faults


def split_words(value: object) -> object:
    """Return the strings in `value` split at commas, as a tuple; anything else unchanged."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        return value
    return tuple(part.strip() for word in words for part in word.split(","))


def is_several_names(text: str) -> bool:
    """Whether `text` is names with commas between them, and not one regular expression."""
    return _SEVERAL_NAMES.fullmatch(text) is not None


def check_special_tokens(tokens: object) -> list[str]:
    """Return the faults of `special_tokens`."""
    if not is_tuple_of(str, tokens):
        return check(False, "special_tokens", tokens, "a list of strings")
    words = cast(tuple[str, ...], tokens)
    faults = check("" not in words, "special_tokens", words, "non-empty strings")
    twice = sorted({word for word in words if words.count(word) > 1})
    return faults + check(not twice, "special_tokens", words, f"distinct, and has {twice} twice")


def check_reading(
    raw: object, system: object, template: object, columns: object, chat_template: object
) -> list[str]:
    """Return the faults of the settings that say what rows become."""
    faults = []
    for name, value, kind in (
        ("raw", raw, bool),
        ("system", system, str),
        ("template", template, str),
    ):
        is_right = value is None or isinstance(value, kind)
        faults += check(is_right, name, value, f"of type {kind.__name__}, or None")
    pairs = columns.items() if isinstance(columns, dict) else [(None, None)]
    is_map = all(isinstance(part, str) and isinstance(name, str) for part, name in pairs)
    faults += check(is_map, "columns", columns, "a mapping of parts to columns")
    if raw and system:
        faults.append(f"system={system!r}: it needs turns, so leave it out with raw")
    if raw and chat_template is not None:
        faults.append(f"chat_template={str(chat_template)!r}: leave it out with raw")
    if template == "":
        faults.append("template='': it names no column; leave it out, or write one")
    if columns and template:
        faults.append(f"columns={columns!r}: leave them out with template, which names some")
    return faults


def is_int(value: object) -> bool:
    """Whether `value` is a whole number, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_nf4_block(value: object) -> bool:
    """Whether so many values may share a scale in nf4."""
    return is_int(value) and value in NF4_BLOCKS


def is_tuple_of(kind: type, value: object) -> bool:
    """Whether `value` is a tuple of this type."""
    right = isinstance(value, tuple) and all(isinstance(item, kind) for item in value)
    return right and not any(isinstance(item, bool) for item in value)  # type: ignore[attr-defined]


def is_pattern(value: object) -> bool:
    """Whether `value` is a regular expression that compiles."""
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError):
        return False


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, and no bool."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond a float
        return False
