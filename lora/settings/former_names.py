"""Settings that can be made and read by the names that they had in earlier versions."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, TypeVar

from lora.errors import ConfigError
from lora.settings.peers import FORMER_NAMES

ConfigT = TypeVar("ConfigT")


def with_former_names(config: type[ConfigT]) -> type[ConfigT]:
    """Let a config be made with the former names of its settings, and be read by them."""
    fields = {each.name for each in dataclasses.fields(config)}  # type: ignore[arg-type]
    former = {old: new for old, new in FORMER_NAMES.items() if new in fields}
    made = config.__init__

    @functools.wraps(made)
    def init(self: ConfigT, *args: Any, **settings: Any) -> None:
        for old, new in former.items():
            if old in settings and new in settings:
                raise ConfigError(
                    f"Cannot use {config.__name__}: {old} is the former name of {new}. Give one."
                )
            if old in settings:
                settings[new] = settings.pop(old)
        made(self, *args, **settings)

    config.__init__ = init  # type: ignore[assignment,method-assign]
    for old, new in former.items():
        setattr(config, old, property(operator.attrgetter(new)))
    return config
