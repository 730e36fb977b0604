"""Flags, keys and variables under the names that other tools and older versions have for them.

--lr 1e-4                          --learning-rate 1e-4
--train-on-inputs                  --learn-on all
--per-device-train-batch-size 4    refused, with the flags to write instead
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lora.errors import ConfigError, gather
from lora.settings.peers import PeerSetting, Settings, find_peer

LISTS = ("targets", "exclude", "modules_to_save", "layers", "special_tokens")
"""Our settings that other tools take as several words."""
Notes = Callable[[str], None]


def translate_words(
    command: str, words: list[str], known: Collection[str], on_note: Notes = lambda note: None
) -> list[str]:
    """Return a command's `words` with the names of its own flags, which are `known`.

    Raises ConfigError with all flags that mean something else here, and what to write for each.
    """
    words = _joined(words, known)
    given = given_in(words)
    overridden = _overridden(given, known)
    found: list[str] = []
    faults: list[str] = []
    names: dict[str, str] = {}
    followers = [*words, None][1:]
    taken = False
    for word, follower in zip(words, followers, strict=True):
        if taken:
            taken = False
            continue
        name, is_off = _name(word.partition("=")[0])
        peer = _peer_of(name, known) if word.startswith("--") else None
        if peer is None:
            found.append(word)
            continue
        value = None if follower is None or follower.startswith("--") else follower
        if peer.because:
            taken = value is not None and "=" not in word
            faults.append(_refused_words(word, value, peer, given, known))
            continue
        renamed, taken = _renamed(word, is_off, value, peer)
        text, ours = _text_of(peer, given[name]), _as_flag(str(peer.ours))
        if why := peer.why_refused(text):
            faults.append(f"{_shown(word, value)}: {_named(why, _as_flag)}")
        elif name not in overridden:
            if names.setdefault(ours, word) != word:
                faults.append(f"{word} is {ours}, as {names[ours]}: both are given. Keep one")
            if _has_note(peer, text, given, known):
                on_note(f"note: {word} is {ours}: {_named(peer.note, _as_flag)}")
            found += renamed
    _raise_if(faults, command)
    return found


def _joined(words: list[str], known: Collection[str]) -> list[str]:
    """Return `words` with the values of other tools' lists joined: q_proj v_proj as q_proj,v_proj.

    A word that is a path on this disk is none of them.
    """
    found: list[str] = []
    in_list = False
    for word in words:
        if word.startswith("--"):
            peer = _peer_of(_name(word.partition("=")[0])[0], known)
            in_list = peer is not None and peer.ours in LISTS and "=" not in word
        elif in_list and not found[-1].startswith("--"):
            if re.fullmatch(r"[\w,]+", word) and not Path(word).exists():
                found[-1] += f",{word}"
                continue
            in_list = False
        found.append(word)
    return found


def _renamed(
    word: str, is_off: bool, follower: str | None, peer: PeerSetting
) -> tuple[list[str], bool]:
    """Return an alias as our flag, and whether the word after it is its value."""
    _, equals, text = word.partition("=")
    flag = _as_flag(str(peer.ours))
    if equals:
        return [f"{flag}={peer.values.get(text.lower(), text)}"], False
    if "true" in peer.values:  # a switch elsewhere: alone, or with true or false
        is_value = (follower or "").lower() in (*peer.values, "true", "false")
        text = str(follower).lower() if is_value else "false" if is_off else "true"
        return [f"{flag}={peer.values.get(text, text)}"], is_value
    if follower is None or is_off:
        return [_as_flag(str(peer.ours), "no-" if is_off else "")], False
    return [flag, peer.values.get(follower.lower(), follower)], True


def translate_settings(
    source: str,
    settings: Mapping[str, Any],
    known: Collection[str],
    on_note: Notes = lambda note: None,
) -> dict[str, Any]:
    """Return the `settings` of a file or of the environment with our names, as `translate_words`.

    A setting that is given under two names is an error.
    """
    given = {_name(key)[0]: v for key, v in settings.items() if isinstance(v, str)}
    overridden = _overridden(given, known)
    found: dict[str, Any] = {}
    faults: list[str] = []
    names: dict[str, str] = {}
    for key, value in settings.items():
        peer = _peer_of(_name(key)[0], known)
        if peer is not None and peer.because:
            text = value if isinstance(value, str) else ""
            shown = f"{_as_key(key)}: {value}" if text else _as_key(key)
            faults.append(f"{shown}: {_advice(peer, text, given, known, _as_key)}")
            continue
        text = value if isinstance(value, str) else ""
        if peer is not None and (why := peer.why_refused(text)):
            faults.append(f"{_as_key(key)}: {value}: {_named(why, _as_key)}")
            continue
        if _name(key)[0] in overridden:
            continue
        ours = key if peer is None else str(peer.ours).replace("_", "-")
        if ours in names:
            faults.append(f"{_as_key(key)} is {_as_key(names[ours])}: both are given. Keep one")
        names[ours] = key
        if peer is not None and _has_note(peer, text, given, known):
            on_note(f"note: {_as_key(key)} is {peer.ours}: {_named(peer.note, _as_key)}")
        is_other = peer is not None and isinstance(value, str)
        found[ours] = peer.values.get(value.lower(), value) if peer and is_other else value
    _raise_if(faults, source)
    return found


def _overridden(given: Settings, known: Collection[str]) -> set[str]:
    """Return the names among `given` that are aliases of a setting given by another name too.

    An alias that says the same as that name, or gives way to it, is left out; others are a fault.
    """
    ours: dict[str, list[tuple[str, str, PeerSetting | None]]] = {}
    for name, text in given.items():
        peer = _peer_of(name, known)
        if peer is None or not peer.because:
            value = text if peer is None else _value_here(peer, text)
            ours.setdefault(str(name if peer is None else peer.ours), []).append(
                (name, value, peer)
            )
    overridden: set[str] = set()
    for same in ours.values():
        if len({value for _, value, _ in same}) > 1:
            weak = [n for n, value, peer in same if peer is not None and value == peer.gives_way]
            overridden.update(weak)
        left = [each for each in same if each[0] not in overridden]
        left.sort(key=lambda each: each[2] is not None)  # our own name before its aliases
        seen = [value for _, value, _ in left]
        overridden.update(
            name
            for number, (name, value, peer) in enumerate(left)
            if peer is not None and value in seen[:number]
        )
    return overridden


def _has_note(peer: PeerSetting, text: str, given: Settings, known: Collection[str]) -> bool:
    """Whether the user of an alias, with this value beside `given`, should be told something."""
    if not peer.note or text.lower() == "false" or _value_here(peer, text) == peer.gives_way:
        return False
    if peer.note_about and peer.note_about not in known:
        return False  # the command has no such setting
    others = {name: _peer_of(name, known) for name in given}
    ours = {name if other is None else other.ours for name, other in others.items()}
    return peer.note_about not in ours


def _value_here(peer: PeerSetting, text: str) -> str:
    """Return the value of ours that an alias with this text has."""
    known = _text_of(peer, text)
    return peer.values.get(known.lower(), known)


def _text_of(peer: PeerSetting, text: str) -> str:
    """Return the text of an alias; a switch before a word that is no value of it is on."""
    is_switch_alone = "true" in peer.values and text.lower() not in (*peer.values, "false")
    return "true" if is_switch_alone else text


def is_alias(name: str, known: Collection[str]) -> bool:
    """Whether `name` is another tool's name of a setting that is `known`."""
    peer = _peer_of(_name(name)[0], known)
    return peer is not None and not peer.because


def _peer_of(name: str, known: Collection[str]) -> PeerSetting | None:
    """Return what `name` is, if it is no setting of the command itself and is of use to it."""
    if name in known:
        return None
    peer = find_peer(name)
    if peer is not None and peer.beside in known:
        return PeerSetting(peer.beside)
    if peer is None or peer.because:
        return peer if peer and _named_settings(peer) <= set(known) else None
    return peer if peer.ours in known else None


def _named_settings(peer: PeerSetting) -> set[str]:
    """Return our settings that a refusal names; one of training where it names none."""
    return set(re.findall(r"`(\w+)`", peer.because)) or {"rank"}


def given_in(words: list[str]) -> dict[str, str]:
    """Return the flags among `words` with their values; true or false for those without."""
    found = {}
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        flag, equals, text = word.partition("=")
        if word.startswith("--"):
            name, is_off = _name(flag)
            alone = "false" if is_off else "true"
            found[name] = text if equals else alone if following.startswith("--") else following
    return found


def _name(flag: str) -> tuple[str, bool]:
    """Return a flag's name with underscores, and whether it switches off: --no-packing."""
    name = flag.lstrip("-").replace("-", "_").lower()
    is_off = flag.startswith("--no-") or flag.startswith("--no_")
    return (name.removeprefix("no_"), True) if is_off else (name, False)


def _refused_words(
    word: str, follower: str | None, peer: PeerSetting, given: Settings, known: Collection[str]
) -> str:
    flag, equals, text = word.partition("=")
    value = text if equals else follower or ("false" if _name(flag)[1] else "true")
    return f"{_shown(word, follower)}: {_advice(peer, value, given, known, _as_flag)}"


def _shown(word: str, follower: str | None) -> str:
    return word if "=" in word or follower is None else f"{word} {follower}"


def _advice(
    peer: PeerSetting,
    value: str,
    given: Settings,
    known: Collection[str],
    written: Callable[[str], str],
) -> str:
    """Return why a setting is not taken, and what to write instead."""
    instead = peer.instead(value, given)
    pairs = [_pair(name, text, written) for name, text in instead.items() if name in known]
    joined = (" " if written is _as_flag else ", ").join(pairs)
    return _named(peer.because, written) + (f". Write {joined}" if pairs else "")


def _pair(name: str, text: str, written: Callable[[str], str]) -> str:
    if written is _as_key:
        return f"{name}: {text}"
    return written(name) if text == "true" else f"{written(name)} {text}"


def _named(text: str, written: Callable[[str], str]) -> str:
    return re.sub(r"`(\w+)`", lambda found: written(found[1]), text)


def _as_flag(name: str, prefix: str = "") -> str:
    return f"--{prefix}{name.replace('_', '-')}"


def _as_key(name: str) -> str:
    return name.replace("-", "_")


def _raise_if(faults: list[str], what: str) -> None:
    if faults:
        heading = f"Cannot use {what}: these settings mean something else here, or nothing:"
        raise ConfigError(gather(faults, heading, "Change them."))
