"""Paths among the flags: `~` is the home directory, whoever wrote it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

from cyclopts import App, ArgumentCollection

from lora.errors import ConfigError

MODEL_FLAG = "--model"
"""A path or a name, so its type does not tell that `~` is meant."""


def expand_home_of_paths(
    app: App, commands: tuple[str, ...], arguments: ArgumentCollection
) -> None:
    """Changes `arguments` in place: expand `~` in values of paths.

    A shell does it for a word of its own, not in `--out=~/runs`, YAML and environment variables.
    """
    for argument in arguments:
        if _is_path(argument.hint) or MODEL_FLAG in argument.names:
            argument.tokens[:] = [
                token.evolve(value=expand_home(token.value)) for token in argument.tokens
            ]


def expand_home(text: str) -> str:
    """Return a path with `~` expanded. Raises ConfigError for a home directory not known."""
    if not text.startswith("~") or os.path.lexists(text):
        return text
    found = os.path.expanduser(text)
    if found == text:
        name = text.partition(os.sep)[0]
        raise ConfigError(
            f"Cannot use the path {text!r}: the home directory {name} is not known. Write the path "
            "out, or put ./ before a name that begins with ~."
        )
    return found


def _is_path(hint: Any) -> bool:
    return hint is Path or any(_is_path(part) for part in get_args(hint))
