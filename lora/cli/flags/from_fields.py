"""Flags made from the fields of configuration dataclasses: names, types, defaults and help texts.

    @flags_from(TrainConfig, without=("seed",))
    class SweepTraining:
        "Training settings that all candidates share."

        batch_size: int = TrainConfig.batch_size
        "Optimizer steps of each candidate."

gives `lora sweep` a flag for each field of TrainConfig but `seed`; what the class's own body states
(a type, a default, a text) replaces the field's. A flag's group is in the field's metadata.
No torch here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

from cyclopts import Group, Parameter

from lora.config import GROUP, GROUP_TITLES
from lora.errors import ConfigError
from lora.public.field_texts import texts_of_module

FlagsT = TypeVar("FlagsT")
ConfigT = TypeVar("ConfigT")

GROUPS = {title: Group.create_ordered(title) for title in GROUP_TITLES}
MODEL, DATA, COMPARED, LORA, TRAINING, EVALUATION, GENERATION, OUTPUT, DEVICE = GROUPS.values()
"""The groups of `--help`, for flags that no field stands behind."""

GROUP_KEYS = {
    **{"model": MODEL.name, "data": DATA.name, "compare": COMPARED.name, "lora": LORA.name},
    **{"training": TRAINING.name, "evaluation": EVALUATION.name, "generation": GENERATION.name},
    **{"output": OUTPUT.name, "device": DEVICE.name},
}
"""By key of a settings file under which flags may stand: the group that they belong to."""

Flat = Parameter(name="*")
"""On a parameter that is a dataclass of flags: they have no prefix."""


def flags_from(
    config: type,
    *,
    without: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    unset: bool = False,
) -> Callable[[type[FlagsT]], type[FlagsT]]:
    """Return a decorator that turns a class into a dataclass with `config`'s fields as flags.

    Fields: all but `without`, or those of `only`. What the class annotates itself replaces the
    field of that name: type, default and, if there is one, text. The result checks nothing;
    `config_from` makes the config, which checks itself. With `unset` the flags' own default is
    None, "not given", for what else supplies the values; see `changed_by`.

    Raises ConfigError for a field whose metadata name no group.
    """

    def decorate(cls: type[FlagsT]) -> type[FlagsT]:
        own = {f.name: f for f in dataclasses.fields(dataclasses.dataclass(cls))}  # type: ignore[arg-type]
        known = {f.name: f for f in dataclasses.fields(config)}
        chosen = only or tuple(name for name in known if name not in without)
        fields = {name: known[name] for name in chosen} | own
        groups = {name: _group_of(known.get(name, each)) for name, each in fields.items()}
        hints = get_type_hints(config) | get_type_hints(cls)
        texts = field_texts(config) | field_texts(cls)
        made = dataclasses.make_dataclass(
            cls.__name__,
            [
                (name, *_field(hints[name], texts.get(name, ""), groups[name], each, unset))
                for name, each in fields.items()
            ],
            namespace={"__doc__": cls.__doc__, "__module__": cls.__module__},
            frozen=True,
        )
        return made

    return decorate


def config_from(config: type[ConfigT], flags: object) -> ConfigT:
    """Return a `config` with the values of `flags`. Raises ConfigError if they are out of range."""
    return config(**vars(flags))


def changed_by(config: ConfigT, flags: object | None) -> ConfigT:
    """Return `config` with the values of those `flags` that are given, made with `unset`."""
    given = {} if flags is None else {k: v for k, v in vars(flags).items() if v is not None}
    return dataclasses.replace(config, **given)  # type: ignore[type-var]


def _group_of(field: dataclasses.Field[Any]) -> Group:
    name = field.metadata.get(GROUP)
    if name not in GROUPS:
        raise ConfigError(
            f"Cannot make a flag of {field.name}: its metadata name the group {name!r}. Allowed: "
            f"{', '.join(GROUPS)}. Write field(default=…, metadata=TRAINING), as in lora/config.py."
        )
    return GROUPS[name]


def _field(
    hint: Any, text: str, group: Group, field: dataclasses.Field[Any], unset: bool
) -> tuple[Any, Any]:
    metavar = "NAME=VALUE..." if get_origin(hint) is dict else None
    parameter = Parameter(help=text, group=group, metavar=metavar)
    if unset:
        return Annotated[hint | None, parameter], dataclasses.field(default=None)
    return Annotated[hint, parameter], _with_default(field)


def field_texts(owner: type) -> dict[str, str]:
    """Return by field the first paragraph under it, on one line, with `field` as --field."""
    texts = texts_of_module(owner.__module__).get(owner.__name__, {})
    return {name: _as_help(text, texts) for name, text in texts.items()}


def _with_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=field.default)


def _as_help(text: str, fields: Mapping[str, str]) -> str:
    def flag(found: re.Match[str]) -> str:
        return "--" + found[1].replace("_", "-") if found[1] in fields else found[1]

    return re.sub(r"`(\w+)`", flag, " ".join(text.split("\n\n")[0].split()))
