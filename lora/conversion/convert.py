"""Settings of another tool's YAML file as ours, with what becomes of every key.

A tool is a `Tool`: marks to know it by, a rule for each of its keys, its defaults where they differ
from ours. A rule turns a value into an `Outcome`: settings of ours, nothing to do, or no equivalent
here. Values are texts, as they are written in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora.errors import ConfigError
from lora.settings.peers import find_peer

Keys = Mapping[str, Any]
"""The keys of a file with their values: texts, None, lists or mappings."""

LORA_SETTINGS = (
    *("rank", "alpha", "dropout", "targets", "exclude", "modules_to_save", "rslora"),
    *("layers", "rank_pattern", "alpha_pattern"),
)
"""Settings that only a new adapter has."""
BASE_SETTINGS = ("base_dtype", "nf4_block", "nf4_double_quant", "nf4_embeddings")
"""Settings of a frozen base."""


@dataclass(frozen=True)
class Outcome:
    """What becomes of a key: settings of ours, one without an equivalent, or nothing to do."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    """Of the settings: what differs; without any: why nothing is needed."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """By part of the key, "" for the whole: what has no equivalent here, and what to do."""


Rule = Callable[[Any, Keys], Outcome]
"""(value, all keys of the file) -> what becomes of it."""


@dataclass(frozen=True)
class Tool:
    """Another tool's configuration format."""

    name: str
    marks: frozenset[str]
    """Keys that only this tool's files have."""
    rules: Mapping[str, Rule]
    prefixes: Mapping[str, Rule] = field(default_factory=dict)
    """Rules of all keys that begin so, where `rules` has none."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Its values for keys that a file leaves out, where ours would differ. "a|b": of a, where
    neither a nor b is given."""
    is_nested: bool = False
    """Whether the keys of inner mappings are settings of their own: `optimizer.lr`."""


@dataclass
class Conversion:
    """A file's settings as ours, and what became of each of its keys."""

    tool: Tool
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)
    """By setting of ours: the keys that it comes from."""
    notes: dict[str, str] = field(default_factory=dict)
    """By key: what differs in what it became."""
    nothing: dict[str, str] = field(default_factory=dict)
    """By key: why nothing is needed for it."""
    missing: dict[str, str] = field(default_factory=dict)
    """By key: what has no equivalent here, and what to do."""
    empty: list[str] = field(default_factory=list)
    """Keys without a value."""


def convert_settings(keys: Keys, tools: tuple[Tool, ...], known: tuple[str, ...]) -> Conversion:
    """Return what a file's `keys` are here; `known` are our settings, in the order to write them.

    Raises ConfigError if no tool has such keys, or they are of a training that does not exist here.
    """
    tool = recognise(keys, tools)
    given = flatten(keys) if tool.is_nested else dict(keys)
    found = Conversion(tool)
    for key, value in given.items():
        if value in (None, "", [], {}):
            found.empty.append(key)
        else:
            _record(found, key, _outcome(tool, key, value, given, known), known)
    absent = {
        key.partition("|")[0]: value
        for key, value in tool.defaults.items()
        if all(given.get(name) in (None, "") for name in key.split("|"))
    }
    for key, value in absent.items():
        outcome = _outcome(tool, key, value, {**given, **absent}, known)
        if not outcome.settings.keys() & found.settings.keys():
            _record(found, f"{key}, {tool.name}'s default {value}", outcome, known)
    _drop_adapter_settings(found)
    found.settings = {name: found.settings[name] for name in known if name in found.settings}
    return found


def recognise(keys: Keys, tools: tuple[Tool, ...]) -> Tool:
    """Return the tool that a file with these `keys` is of. Raises ConfigError if none is."""
    names = set(flatten(keys)) | {name.rpartition(".")[2] for name in flatten(keys)} | set(keys)
    scores = {tool.name: len(tool.marks & names) for tool in tools}
    best = max(tools, key=lambda tool: scores[tool.name])
    if not scores[best.name]:
        shown = ", ".join(sorted(keys)[:8]) or "none"
        known = ", ".join(tool.name for tool in tools)
        raise ConfigError(
            f"Cannot convert these settings: their keys ({shown}) are those of no known tool. "
            f"Allowed: a YAML file of {known}."
        )
    return best


def flatten(keys: Keys, prefix: str = "") -> dict[str, Any]:
    """Return inner mappings as keys with dots; lists stay."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _outcome(tool: Tool, key: str, value: Any, given: Keys, known: tuple[str, ...]) -> Outcome:
    rule = tool.rules.get(key)
    if rule is None:
        rule = next((r for prefix, r in tool.prefixes.items() if key.startswith(prefix)), None)
    if rule is None and key in known:
        return Outcome({key: value})
    return _by_table(key, value, given) if rule is None else rule(value, given)


def _by_table(key: str, value: Any, given: Keys) -> Outcome:
    """Return what the table of all tools' names says of a key."""
    peer = find_peer(key.rpartition(".")[2])
    if is_off(value) and (peer is None or peer.because):
        return Outcome(note="off there and here")
    if peer is None:
        return Outcome(missing={"": "not known to this converter"})
    text = value if isinstance(value, str) else ""
    if why := peer.why_refused(text):
        return Outcome(missing={"": _plain(why)})
    if not peer.because:
        ours = peer.values.get(text.lower(), value)
        return Outcome({str(peer.ours): ours}, note=_plain(peer.note))
    texts = {name: v for name, v in given.items() if isinstance(v, str)}
    instead = peer.instead(text, texts)
    because = _plain(peer.because)
    return Outcome(instead, because) if instead else Outcome(missing={"": because})


def _record(found: Conversion, key: str, outcome: Outcome, known: tuple[str, ...]) -> None:
    for part, why in outcome.missing.items():
        found.missing[f"{key}{part}"] = why
    for name, value in outcome.settings.items():
        if name in known:
            found.settings[name] = value
            found.origins.setdefault(name, []).append(key)
        else:
            found.missing[key] = f"there is no setting {name} here"
    if outcome.note and outcome.settings:
        found.notes[key] = outcome.note
    elif not outcome.settings and not outcome.missing:
        found.nothing[key] = outcome.note or "nothing to do"


def _drop_adapter_settings(found: Conversion) -> None:
    """Leave out what only a new adapter has, or a frozen base, where there is none: it would be
    refused."""
    dropped: dict[str, str] = {}
    if "from_adapter" in found.settings:
        dropped |= dict.fromkeys(LORA_SETTINGS, "the adapter that is continued has its own")
    if "full" in found.settings:
        dropped |= dict.fromkeys(LORA_SETTINGS, "all weights train: there is no adapter")
        dropped |= dict.fromkeys(BASE_SETTINGS, "all weights train: none are quantised")
    for name, reason in dropped.items():
        if found.settings.pop(name, None) is not None:
            for key in found.origins.pop(name):
                found.notes.pop(key, None)
                found.nothing[key] = reason


def _plain(text: str) -> str:
    return text.replace("`", "")


def is_on(value: Any) -> bool:
    """Whether a value of a YAML file means true."""
    return isinstance(value, str) and value.lower() in ("true", "yes", "on")


def is_off(value: Any) -> bool:
    """Whether a value of a YAML file means false, none or nothing."""
    return value in (None, "", [], {}) or (
        isinstance(value, str) and value.lower() in ("false", "no", "off", "none", "0")
    )


def number(value: Any) -> float | None:
    """Return the finite number that a value of a YAML file is, or None."""
    try:
        found = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def same(ours: str, values: Mapping[str, str] | None = None, note: str = "") -> Rule:
    """Return the rule of a key that means our setting `ours`; `values` are written otherwise."""
    table = values or {}

    def rule(value: Any, keys: Keys) -> Outcome:
        text = value.lower() if isinstance(value, str) else value
        if table and isinstance(text, str) and text in table:
            return Outcome({ours: table[text]}, note)
        return Outcome({ours: value}, note)

    return rule


def nothing(why: str) -> Rule:
    """Return the rule of a key for which nothing is needed."""
    return lambda value, keys: Outcome(note=why)


def missing(why: str) -> Rule:
    """Return the rule of a key without an equal; switched off, it needs none."""

    def rule(value: Any, keys: Keys) -> Outcome:
        return Outcome(note="off there and here") if is_off(value) else Outcome(missing={"": why})

    return rule


def refused(what: str) -> Rule:
    """Return the rule of a key whose value names a training that does not exist here."""

    def rule(value: Any, keys: Keys) -> Outcome:
        raise ConfigError(
            f"Cannot convert these settings: {what} ({value!r:.80}). Here is supervised "
            "fine-tuning: conversations, prompts with completions, texts."
        )

    return rule
