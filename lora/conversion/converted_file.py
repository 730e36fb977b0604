"""A conversion as text: the YAML file for `lora finetune`, and what became of each key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora.conversion.convert import Conversion

_PLAIN = re.compile(r"[A-Za-z0-9_./@+][A-Za-z0-9_./@+-]*")
_ALWAYS = "AdamW's betas are 0.9 and 0.99, and LoRA and optimizer states are fp32."


def yaml_text(found: Conversion, source: str) -> str:
    """Return our YAML file, each setting with the keys that it comes from."""
    head = f"# Settings of lora finetune, converted from {found.tool.name}'s {source}.\n"
    lines = []
    for name, value in found.settings.items():
        line = f"{name}: {yaml_value(value)}"
        lines.append(f"{line:<40}  # {', '.join(found.origins[name])}")
    if found.missing:
        lines += ["", "# No equal here:"]
        lines += [f"#   {key}: {why}" for key, why in found.missing.items()]
    return head + "".join(_one_line(line).rstrip() + "\n" for line in lines)


def report_lines(found: Conversion) -> Iterator[str]:
    """Yield what became of each key, in lines for a person."""
    width = max(map(len, found.settings), default=0)
    yield f"{found.tool.name}: {len(found.settings)} settings converted"
    for name, value in found.settings.items():
        yield f"  {name:<{width}}  {yaml_value(value)}  from {', '.join(found.origins[name])}"
    if found.empty:
        yield f"empty there: {', '.join(found.empty)}"
    nothing = [f"{key}: {why}" for key, why in found.nothing.items()]
    yield from _section(f"nothing to do: {len(nothing)}", nothing)
    keys: dict[str, list[str]] = {}
    for key, note in found.notes.items():
        keys.setdefault(note, []).append(key)
    notes = [f"{', '.join(names)}: {note}" for note, names in keys.items()]
    yield from _section("what differs", [*notes, _ALWAYS])
    missing = [f"{key}: {why}" for key, why in found.missing.items()]
    yield from _section(f"no equivalent here: {len(missing)}", missing)
    if "data" not in found.settings:
        yield "The training data are not among the settings: add data: FILE, or give --data."


def _section(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield title
        yield from (f"  {line}" for line in lines)


def yaml_value(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {yaml_value(inner)}' for key, inner in value.items())}}}"
    text = str(value)
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in ("null", "~")
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
