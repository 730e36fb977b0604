"""What a model folder says about its tokenizer: special tokens, chat template, stop tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.errors import DataError, gather

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")
CONTENT_TOKENS = "content_tokens"
"""Our own key in tokenizer_config.json."""
MAX_TOKEN_ID = 2**32 - 1
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_TEMPLATE, _GENERATION = "chat_template.jinja", "generation_config.json"


@dataclass(frozen=True)
class TokenizerFiles:
    """What tokenizer.json does not say."""

    special_tokens: Mapping[str, str | None]
    """By SPECIAL_TOKENS."""
    chat_template: str | None
    eos_ids: tuple[int, ...]
    """Of generation_config.json."""
    notes: tuple[str, ...]
    """What is not used, for messages."""
    content_tokens: tuple[str, ...] = ()
    """Special tokens that messages may spell out: our own key of tokenizer_config.json."""


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Return what the files in `folder` say; those that are missing say nothing.

    Raises DataError for files that cannot be read, or that say what cannot be used, all at once.
    """
    config, named = _read_object(folder / _CONFIG), _read_object(folder / _MAP)
    faults, notes = list[str](), list[str]()
    tokens = {
        word: _token(config.get(word), f"{_CONFIG}: {word}", faults)
        or _token(named.get(word), f"{_MAP}: {word}", faults)
        for word in SPECIAL_TOKENS
    }
    template = _chat_template(folder, config.get("chat_template"), faults, notes)
    ids = _eos_ids(_read_object(folder / _GENERATION).get("eos_token_id"), faults)
    if faults:
        heading = f"Cannot load the tokenizer in {folder}:"
        raise DataError(gather(faults, heading, "Correct these files, or copy them again."))
    meant = config.get(CONTENT_TOKENS)
    content = [t for t in meant if isinstance(t, str)] if isinstance(meant, list) else []
    return TokenizerFiles(tokens, template, ids, tuple(notes), tuple(content))


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"Cannot read {path} as JSON: {error}. Copy it again.") from None
    if not isinstance(value, dict):
        raise DataError(
            f"Cannot read {path}: it holds a {type(value).__name__}. A JSON object is needed."
        )
    return value


def _token(value: Any, name: str, faults: list[str]) -> str | None:
    found = value.get("content") if isinstance(value, dict) else value  # with its flags, or alone
    if found is None or isinstance(found, str):
        return found
    faults.append(f"{name}={_shown(value)}: allowed: a token, or null")
    return None


def _chat_template(folder: Path, value: Any, faults: list[str], notes: list[str]) -> str | None:
    path = folder / _TEMPLATE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"Cannot read {path} as text: {error}. Copy it again.") from None
    if value is None or isinstance(value, str):
        return value
    named: dict[str, str] = {}
    for item in value if isinstance(value, list) else [value]:
        name, source = (
            (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(source, str):
            faults.append(
                f"{_CONFIG}: chat_template={_shown(value)}: allowed: a string, or a list of "
                "objects with name and template"
            )
            return None
        named[name] = source
    if named and "default" not in named:
        names = ", ".join(sorted(named))
        notes.append(
            f"note: {_CONFIG} has the chat templates {names} and none called default: none is used"
        )
    return named.get("default")  # as transformers does


def _eos_ids(value: Any, faults: list[str]) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    good = [v for v in values if type(v) is int and 0 <= v <= MAX_TOKEN_ID]
    if len(good) < len(values):
        faults.append(
            f"{_GENERATION}: eos_token_id={_shown(value)}: allowed: ids from 0 to {MAX_TOKEN_ID:,}"
        )
    return tuple(good)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
