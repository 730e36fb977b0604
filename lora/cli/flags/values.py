"""Values of flags, whatever they come from: command line, environment or file.

Run by cyclopts after all sources and before it converts the texts. Commas separate the values of
flags that take several (`--layers 0,1`, `--rank-pattern q_proj=4,v_proj=8`), `~` is the home
directory. cyclopts would round a fraction for a whole number, and pass null bytes on to the
system's calls.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import App, ArgumentCollection, Token
from cyclopts.argument import Argument

from lora.config import DataConfig, LoRAConfig
from lora.errors import ConfigError, gather
from lora.settings.checks import is_several_names

_WHOLE = re.compile(r"[+-]?\d[\d_]*\.0*")
_NOT_WHOLE = "must be a whole number"
_YAML_BOOLS = {"on": "true", "off": "false"}


def check_values(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Split lists at commas, expand `~` in paths, refuse values that conversion would change.

    Changes the tokens of `arguments` in place. Raises ConfigError with all faults.
    """
    faults: list[str] = []
    for argument in arguments:
        kinds = set(_leaves(argument.hint))
        if argument.index is None:  # prompts and paths keep their commas
            argument.tokens[:] = _split(argument.tokens, kinds, faults)
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


def name_pairs(words: Iterable[str]) -> list[str]:
    """Return the command line `words` with `--rank-pattern q=4,v=8` as `--rank-pattern.q=4 …`.

    So that the flag can be repeated, and a name that is given twice is an error.
    """
    flags = _flags_of_mappings()
    found: list[str] = []
    remaining = iter(words)
    for word in remaining:
        flag, equals, text = word.partition("=")
        if flag not in flags:
            found.append(word)
            continue
        text = text if equals else next(remaining, "")
        parts = [part.strip() for part in text.split(",")]
        is_pairs = not text.lstrip().startswith("{") and all("=" in part for part in parts)
        found += [f"{flag}.{part}" for part in parts] if is_pairs else [f"{flag}={text}"]
    return found


@functools.cache
def _flags_of_mappings() -> frozenset[str]:
    hints = get_type_hints(LoRAConfig) | get_type_hints(DataConfig)
    names = (name for name, hint in hints.items() if dict in _leaves(hint))
    return frozenset(f"--{name.replace('_', '-')}" for name in names)


def _split(tokens: Iterable[Token], kinds: set[Any], faults: list[str]) -> list[Token]:
    """Return the tokens of a flag that takes several values, one for each value."""
    if not kinds & {tuple, list, dict}:
        return list(tokens)
    if dict not in kinds:
        parts = [part for token in tokens for part in _items(token, kinds)]
        return [token.evolve(index=n) for n, token in enumerate(parts)]
    parts = [part for token in tokens for part in _pairs(token, faults)]
    times = Counter(token.keys for token in parts if token.keys)
    faults += [f"{name!r} is given twice" for (name,), n in times.items() if n > 1]
    return parts


def _items(token: Token, kinds: set[Any]) -> list[Token]:
    is_one = str in kinds and not is_several_names(token.value.strip())
    if is_one or "," not in token.value or token.value.lstrip().startswith(("[", "{")):
        return [token]
    return [token.evolve(value=part.strip()) for part in token.value.split(",")]


def _pairs(token: Token, faults: list[str]) -> list[Token]:
    """Return `q_proj=4,v_proj=8` as two values with their names."""
    if token.keys:  # --rank-pattern.layers.0.q_proj 4
        return [token.evolve(keys=(".".join(token.keys),))]
    if token.value.lstrip().startswith("{"):
        return [token]
    pairs = [part.rpartition("=") for part in token.value.split(",")]
    if not all(name.strip() and value.strip() for name, _, value in pairs):
        faults.append(f"{_source(token)}={token.value!r}: must be name=value, as in q=4,v=8")
    return [token.evolve(value=value.strip(), keys=(name.strip(),)) for name, _, value in pairs]


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
    words = sorted(kind for kind in kinds if isinstance(kind, str))
    if is_whole and words and token.value not in words:  # a number or a word: --devices all
        is_number = re.fullmatch(r"[+-]?\d+(\.0*)?", token.value.strip())
        return "" if is_number else f"{_NOT_WHOLE}, or {' or '.join(words)}"
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
                f"{_source(token)}={token.value!r}: the home directory that ~ means is "
                "not known. Write the path out."
            )
    if bool in kinds and token.value.lower() in _YAML_BOOLS:
        return token.evolve(value=_YAML_BOOLS[token.value.lower()])
    return token


def _source(token: Token) -> str:
    return token.keyword or "value"


def _name(argument: Argument, token: Token) -> str:
    keys = "".join(f"[{key}]" for key in token.keys)
    return f"{argument.name}{keys}"
