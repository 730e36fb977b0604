"""The base class of all settings, and what it says of a name that is no setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora.errors import ConfigError, UnknownSettingError, did_you_mean
from lora.settings.peers import FORMER_NAMES, find_peer


class Settings:
    """Base of all settings: refuses a name that is no field, and says which one is meant."""

    def __new__(cls, *values: Any, **named: Any) -> Any:
        known = names_of(cls)
        wrong = describe_unknown(named, known)
        if wrong:
            raise UnknownSettingError(f"Cannot use {cls.__name__}: {wrong}")
        return super().__new__(cls)


def names_of(settings: type) -> list[str]:
    """Return the names of the fields of a dataclass."""
    return [field.name for field in dataclasses.fields(settings)]


def describe_unknown(given: Mapping[str, Any], known: list[str]) -> str:
    """Return what is wrong with names that are not `known`, each with what is meant; "" if none."""
    allowed = {*known, *(old for old, new in FORMER_NAMES.items() if new in known)}
    unknown = [name for name in given if name not in allowed]
    if not unknown:
        return ""
    others = {name: str(value) for name, value in given.items()}
    faults = " ".join(_unknown(name, others, known) for name in unknown)
    return f"{faults} Allowed: {', '.join(known)}."


def by_names_of_today(given: Mapping[str, Any], verb: str) -> dict[str, Any]:
    """Return the settings by the names that they have in this version.

    Raises ConfigError, as what cannot `verb`, for one that has both its names.
    """
    for former, name in FORMER_NAMES.items():
        if former in given and name in given:
            raise ConfigError(f"Cannot {verb}: {former} is the former name of {name}. Give one.")
    return {FORMER_NAMES.get(name, name): value for name, value in given.items()}


def _unknown(name: str, given: Mapping[str, str], known: list[str]) -> str:
    start, peer = f"there is no setting {name!r}", find_peer(name)
    if peer is not None and peer.because:
        instead = peer.instead(given[name].lower(), given)
        written = ", ".join(f"{ours}={text}" for ours, text in instead.items())
        because = peer.because.replace("`", "")
        return f"{start}: {because}." + (f" Write {written}." if written else "")
    if peer is not None and (why := peer.why_refused(given[name])):
        return f"{start}: {why.replace('`', '')}."
    meant = name if peer is None else str(peer.ours)
    if meant in known:
        return f"{start}: here it is {meant!r}."
    owners = [owner.__name__ for owner in Settings.__subclasses__() if meant in names_of(owner)]
    if owners:
        called = "" if meant == name else f" {meant!r},"
        return f"{start}: it is{called} a setting of {owners[0]}."
    return f"{start}.{did_you_mean(name, known)}"
