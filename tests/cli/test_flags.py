"""Flags made from the fields of a config, and the help that all commands print."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from cyclopts import Parameter

from lora.cli import COMMANDS, build_app
from lora.cli.flags.from_fields import TRAINING, config_from, field_texts, flags_from
from lora.config import ConfigError, LoRAConfig, TrainConfig

COLUMNS = 80


@dataclass(frozen=True)
class Kiln:
    """A made-up config."""

    degrees: int = 900
    """Temperature, with `hours`
    and `pots_each`, never `other`."""
    hours: float | None = None
    """Hours."""
    glaze: Literal["matt", "gloss"] = "matt"
    pots_each: dict[str, int] = field(default_factory=dict)
    """Pots by name."""

    def __post_init__(self) -> None:
        if self.degrees < 0:
            raise ConfigError("too cold")


@flags_from(Kiln, TRAINING, without=("glaze",))
class KilnFlags:
    """Flags of a kiln."""

    hours: int = 8
    degrees: int = 1200
    """Temperature of this command."""


def flag(kind: type, name: str) -> tuple[Any, Parameter]:
    """Return a flag's type and its cyclopts parameter."""
    hint, parameter = typing.get_args(typing.get_type_hints(kind, include_extras=True)[name])
    return hint, parameter


def test_flags_have_the_fields_names_defaults_and_texts() -> None:
    assert [f.name for f in dataclasses.fields(KilnFlags)] == ["degrees", "hours", "pots_each"]  # type: ignore[arg-type]
    assert vars(KilnFlags()) == {"degrees": 1200, "hours": 8, "pots_each": {}}
    hint, parameter = flag(KilnFlags, "pots_each")
    assert hint == dict[str, int]
    assert parameter.help == "Pots by name."
    assert parameter.group == (TRAINING,)


def test_what_the_class_says_itself_replaces_type_default_and_text() -> None:
    assert flag(KilnFlags, "hours")[0] is int
    assert flag(KilnFlags, "hours")[1].help == "Hours."  # no text of its own
    assert flag(KilnFlags, "degrees")[1].help == "Temperature of this command."


def test_only_some_fields() -> None:
    @flags_from(TrainConfig, TRAINING, only=("seed", "steps"))
    class Some:
        """Two flags."""

    assert vars(Some()) == {"seed": TrainConfig.seed, "steps": TrainConfig.steps}


def test_a_text_is_one_line_and_names_flags() -> None:
    text = field_texts(Kiln)["degrees"]
    assert text == "Temperature, with --hours and --pots-each, never other."


def test_a_default_that_can_change_is_made_anew() -> None:
    assert vars(KilnFlags())["pots_each"] is not vars(KilnFlags())["pots_each"]


def test_the_config_made_of_flags_checks_itself() -> None:
    assert config_from(Kiln, KilnFlags()) == Kiln(degrees=1200, hours=8)
    with pytest.raises(ConfigError, match="too cold"):
        config_from(Kiln, KilnFlags(degrees=-1))  # type: ignore[call-arg]


def test_a_field_that_there_is_not_is_an_error() -> None:
    with pytest.raises(KeyError, match="stepps"):

        @flags_from(TrainConfig, TRAINING, only=("stepps",))
        class Some:
            """No flag."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_text_of_whole_sentences_on_one_line(command: str) -> None:
    app = build_app()
    with app.app_stack([command]):
        arguments = app[command].assemble_argument_collection(parse_docstring=True)
    texts = {a.name: a.parameter.help or "" for a in arguments if a.name != "*"}
    faults = [f"{k}: {v!r}" for k, v in texts.items() if "\n" in v or not v.endswith((".", "..."))]
    assert not faults, "\n".join(faults)
    assert texts


@pytest.mark.parametrize("command", COMMANDS)
def test_the_head_of_a_help_breaks_no_line(command: str) -> None:
    head = inspect.cleandoc(function_of(command).__doc__ or "").split("\nParameters\n")[0]
    long = [line for line in head.splitlines() if len(line) > COLUMNS]
    assert not long, "\n".join(["Shorten, for a terminal of 80 columns:", *long])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_prints_the_whole_head(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Some headings, such as "Examples:", are sections to cyclopts, which leaves them out.
    head = inspect.cleandoc(function_of(command).__doc__ or "").split("\nParameters\n")[0]
    build_app(chosen=command)([command, "--help"], result_action="return_value")
    printed = capsys.readouterr().out
    missing = [line for line in head.splitlines() if line.strip() not in printed]
    assert not missing, missing


def function_of(command: str) -> Any:
    """Return the function behind a command."""
    return build_app()[command].default_command


def test_every_field_of_lora_is_a_flag_of_finetune() -> None:
    arguments = build_app()["finetune"].assemble_argument_collection()
    names = {argument.name for argument in arguments}
    for config in (LoRAConfig, TrainConfig):
        for each in dataclasses.fields(config):
            assert f"--{each.name.replace('_', '-')}" in names


def test_groups_are_in_the_order_of_a_users_questions(capsys: pytest.CaptureFixture[str]) -> None:
    build_app(chosen="finetune")(["finetune", "--help"], result_action="return_value")
    printed = capsys.readouterr().out
    titles = ["Model and data", "LoRA", "Training", "Evaluation", "Run directory", "Device"]
    places = [printed.index(f"─ {title}") for title in titles]
    assert places == sorted(places)
