"""Settings from environment variables: LORALM_COMMAND_FLAG."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Env

from lora.cli.flags.translate import Notes, is_alias, translate_settings
from lora.errors import ConfigError, did_you_mean, gather

ENVIRONMENT_PREFIX = "LORALM_"


def environment_reader(command: str | None) -> Env:
    """Return cyclopts' reader of variables, for `command` where it is known."""
    if command is None:
        return Env(ENVIRONMENT_PREFIX)
    # Without its own handling of commands, which keeps the "-" of a name: no variable has one.
    return Env(_prefix(command), command=False)


def known_settings(arguments: ArgumentCollection) -> dict[str, str]:
    """Return the names of a command's flags, with underscores, and the group of each."""
    return {
        name[2:].replace("-", "_"): argument.parameter.group[0].name  # type: ignore[index]
        for argument in arguments
        for name in argument.names
        if name.startswith("--") and argument.parameter.group
    }


def check_environment(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raise ConfigError for variables of a command that has no such flag: cyclopts ignores them."""
    if not commands:
        return
    known, prefix = known_settings(arguments), _prefix(*commands)
    faults = []
    for variable in sorted(_variables(*commands)):
        name = variable.removeprefix(prefix)
        try:
            arguments.match(name, transform=_to_variable, delimiter="_")
        except ValueError:
            if not is_alias(name, known):
                near = did_you_mean(variable, [prefix + each.upper() for each in known])
                faults.append(f"{variable}.{near}")
    if faults:
        command = f"lora {' '.join(commands)}"
        what = f"Cannot run {command}: it has no flags for these environment variables:"
        advice = f"Correct or unset them; `{command} --help` lists the flags."
        raise ConfigError(gather(faults, what, advice))


def given_in_environment(command: str) -> dict[str, str]:
    """Return the settings that variables of `command` give, by name with underscores."""
    prefix = _prefix(command)
    return {name.removeprefix(prefix).lower(): text for name, text in _variables(command).items()}


def aliases_in_environment(command: str, known: Collection[str], on_note: Notes) -> dict[str, Any]:
    """Return the settings that variables of `command` give under names of other tools."""
    named = settings_in_environment(command, known, on_note)
    given = given_in_environment(command)
    return {name: text for name, text in named.items() if name.replace("-", "_") not in given}


def settings_in_environment(command: str, known: Collection[str], on_note: Notes) -> dict[str, Any]:
    """Return all settings that variables of `command` give, by our names, with dashes."""
    given = {name.replace("_", "-"): text for name, text in given_in_environment(command).items()}
    return translate_settings("the environment", given, known, on_note)


def _variables(*commands: str) -> dict[str, str]:
    prefix = _prefix(*commands)
    return {name: text for name, text in os.environ.items() if name.startswith(prefix)}


def _prefix(*commands: str) -> str:
    return ENVIRONMENT_PREFIX + "".join(f"{_to_variable(command)}_" for command in commands)


def _to_variable(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_").upper()
