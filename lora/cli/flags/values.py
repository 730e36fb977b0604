"""Checks of the values of flags, whatever they come from: command line, environment or file.

Run by cyclopts after all sources and before it converts the texts. cyclopts would round a fraction
for a whole number, and pass null bytes on to the system's calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from cyclopts import App, ArgumentCollection, Token
from cyclopts.argument import Argument

from lora.errors import ConfigError, gather

_WHOLE = re.compile(r"[+-]?\d[\d_]*\.0*")
_NOT_WHOLE = "must be a whole number"
_YAML_BOOLS = {"on": "true", "off": "false"}


def check_values(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse values that conversion would change, and expand `~` in paths.

    Changes the tokens of `arguments` in place. Raises ConfigError with all faults.
    """
    faults = []
    for argument in arguments:
        kinds = set(_leaves(argument.hint))
        for n, token in enumerate(argument.tokens):
            reason = _why_not(token, kinds)
            if reason:
                faults.append(f"{_name(argument, token)}={token.value!r}: {reason}")
            else:
                argument.tokens[n] = _as_meant(token, kinds, faults)
    if faults:
        command = f"lora {' '.join(commands)}"
        advice = f"Change these values; see `{command} --help`."
        raise ConfigError(gather(faults, f"Cannot run {command}:", advice))


def _leaves(hint: Any) -> Iterator[Any]:
    """Return the types in a hint: int and str for `tuple[int | str, ...] | None`."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    inner = get_args(hint)
    yield get_origin(hint) or hint
    for each in inner:
        yield from _leaves(each)


def _why_not(token: Token, kinds: set[Any]) -> str:
    if "\0" in token.value:
        return "has a null character"
    is_whole = int in kinds and float not in kinds
    if token.value.lstrip().startswith(("{", "[")) and (is_whole or dict in kinds):
        return _why_not_json(token.value, is_whole)
    return _NOT_WHOLE if is_whole and _is_fraction(token.value) else ""


def _is_fraction(text: str) -> bool:
    """Return whether cyclopts would round `text` to a whole number, or fail at it."""
    try:
        float(text)
    except ValueError:
        return False  # no number at all: the conversion says so
    return "." in text and _WHOLE.fullmatch(text.strip()) is None


def _why_not_json(text: str, is_whole: bool) -> str:
    faults: list[str] = []

    def pairs(given: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in given]
        faults.extend(f"{n!r} is given twice" for n in set(names) if names.count(n) > 1)
        faults.extend("has a null character" for n in names if "\0" in n)
        return dict(given)

    def number(written: str) -> float:
        if is_whole and _is_fraction(written if "." in written else f"{written}."):
            faults.append(_NOT_WHOLE)
        return float(written)

    try:
        json.loads(text, object_pairs_hook=pairs, parse_float=number)
    except (ValueError, RecursionError):
        return ""  # the conversion says so
    return "; ".join(sorted(set(faults)))


def _as_meant(token: Token, kinds: set[Any], faults: list[str]) -> Token:
    if Path in kinds and token.value.startswith("~"):
        try:
            return token.evolve(value=str(Path(token.value).expanduser()))
        except RuntimeError:  # no such user, or no home directory
            faults.append(
                f"{token.keyword or 'path'}={token.value!r}: the home directory that ~ means is "
                "not known. Write the path out."
            )
    if bool in kinds and token.value.lower() in _YAML_BOOLS:
        return token.evolve(value=_YAML_BOOLS[token.value.lower()])
    return token


def _name(argument: Argument, token: Token) -> str:
    keys = "".join(f"[{key}]" for key in token.keys)
    return f"{argument.name}{keys}"
