"""Settings as flags in a Bash script: an array with one flag a line, every value quoted."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def flag_words(settings: Mapping[str, Any]) -> list[list[str]]:
    """Return each setting as the words of its flag; what has an empty default and is empty, none.

    `lora finetune` reads the same values from them: numbers with all digits, names with commas.
    """
    return [words for name, value in settings.items() for words in _words(name, value)]


def flags_array(settings: Mapping[str, Any]) -> str:
    """Return a Bash array `flags` that holds the settings."""
    lines = [f"  {shlex.join(words)}" for words in flag_words(settings)]
    return "\n".join(["flags=(", *lines, ")"])


def command(*lines: str) -> str:
    """Return one command on several lines; their words are quoted already."""
    return " \\\n  ".join(lines)


def comment(text: str) -> str:
    """Return a text as a comment of one line, whatever it holds."""
    return "# " + " ".join(text.split())


def _words(name: str, value: Any) -> list[list[str]]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [[flag if value else f"--no-{flag[2:]}"]]
    if isinstance(value, Mapping):
        return [[f"{flag}.{key}={_text(inner)}"] for key, inner in value.items()]
    if isinstance(value, list | tuple):
        items = [_text(item) for item in value]
        if not any("," in item for item in items):
            items = [",".join(items)] if items else []
        return [_pair(flag, item) for item in items]
    return [_pair(flag, _text(value))]


def _pair(flag: str, text: str) -> list[str]:
    """Return a flag with its value; a value like -x would be taken for a flag by itself."""
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
