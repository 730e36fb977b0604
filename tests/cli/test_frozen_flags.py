"""The command line's surface: every command's flags, defaults and choices stay as recorded.

    python tests/cli/test_frozen_flags.py        # writes flags.json again, after a wanted change

Scripts and YAML files of users name these flags, so none may go or change by accident.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclopts.argument import Argument

from lora.cli import COMMANDS, build_app

RECORD = Path(__file__).with_name("flags.json")
RENEW = (
    "If users shall see this change, run `python tests/cli/test_frozen_flags.py`, look at the "
    "difference of tests/cli/flags.json and commit it; else restore the flag."
)


def flags_of(command: str) -> dict[str, Any]:
    """Return by flag (or name of a positional argument) what the command accepts for it."""
    app = build_app()
    with app.app_stack([command]):  # its defaults for all commands hold, as in a call
        arguments = app[command].assemble_argument_collection()
    return {
        argument.name: as_json(argument)
        for argument in arguments
        if argument.name != "*"  # a dataclass as a whole; its fields are arguments of their own
    }


def as_json(argument: Argument) -> dict[str, Any]:
    """Return the names, default and choices of one argument; what does not apply is left out."""
    default = argument.field_info.default
    found = {
        "default": None if default is argument.field_info.empty else default,
        "also": sorted(set(argument.names) - {argument.name}),
        "choices": argument.get_choices(),
        "required": argument.required,
        "position": argument.index,
    }
    kept = {k: v for k, v in found.items() if k == "default" or v not in (None, [], (), False)}
    as_read: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return as_read


def as_text(surface: dict[str, dict[str, Any]]) -> str:
    """Return the record's text: one line a flag, so that a difference names the flag."""
    commands = (
        f"  {json.dumps(command)}: {{\n"
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(flags.items()))
        + "\n  }"
        for command, flags in sorted(surface.items())
    )
    return "{\n" + ",\n".join(commands) + "\n}\n"


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, Any]]:
    """By command, then by flag: what was recorded."""
    surface: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return surface


def test_the_commands_are_those_recorded(recorded: dict[str, dict[str, Any]]) -> None:
    assert sorted(COMMANDS) == sorted(recorded), RENEW


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_flags_are_those_recorded(
    command: str, recorded: dict[str, dict[str, Any]]
) -> None:
    now, then = flags_of(command), recorded[command]
    faults = [f"{flag} is gone" for flag in then if flag not in now]
    faults += [f"{flag} is new" for flag in now if flag not in then]
    faults += [
        f"{flag} was {then[flag]}, is {now[flag]}"
        for flag in then
        if flag in now and now[flag] != then[flag]
    ]
    assert not faults, "\n".join([f"lora {command}:", *faults, RENEW])


if __name__ == "__main__":
    RECORD.write_text(as_text({name: flags_of(name) for name in COMMANDS}), encoding="utf-8")
    print(f"wrote {RECORD}")
