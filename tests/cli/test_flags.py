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
from lora.cli.flags.from_fields import GROUPS, config_from, field_texts, flags_from
from lora.config import TRAINING, ConfigError, LoRAConfig, TrainConfig

COLUMNS = 80
MAX_HELP_CHARACTERS = 104
"""Of a flag's text, without its default: two lines of a terminal with 80 columns."""


@dataclass(frozen=True)
class Kiln:
    """A made-up config."""

    degrees: int = field(default=900, metadata=TRAINING)
    """Temperature, with `hours`
    and `pots_each`, never `other`.

    More for who reads the source."""
    hours: float | None = field(default=None, metadata=TRAINING)
    """Hours."""
    glaze: Literal["matt", "gloss"] = "matt"
    pots_each: dict[str, int] = field(default_factory=dict, metadata=TRAINING)
    """Pots by name."""

    def __post_init__(self) -> None:
        if self.degrees < 0:
            raise ConfigError("too cold")


@flags_from(Kiln, without=("glaze",))
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
    assert parameter.group == (GROUPS["Training"],)


def test_a_field_without_a_group_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"flag of glaze: .* Allowed: Model, .*metadata=TRAINING"):

        @flags_from(Kiln)
        class Some:
            """No flag."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_stands_in_one_of_the_groups(command: str) -> None:
    app = build_app()
    with app.app_stack([command]):
        arguments = app[command].assemble_argument_collection()
    groups = {a.name: {g.name for g in a.parameter.group or ()} for a in arguments if a.name != "*"}
    faults = {name: found for name, found in groups.items() if not found <= GROUPS.keys()}
    assert not faults, f"lora {command}: Annotated[…, Parameter(group=DATA)] puts it into a group"


def test_what_the_class_says_itself_replaces_type_default_and_text() -> None:
    assert flag(KilnFlags, "hours")[0] is int
    assert flag(KilnFlags, "hours")[1].help == "Hours."  # no text of its own
    assert flag(KilnFlags, "degrees")[1].help == "Temperature of this command."


def test_only_some_fields() -> None:
    @flags_from(TrainConfig, only=("seed", "steps"))
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

        @flags_from(TrainConfig, only=("stepps",))
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
    long = [f"{k}: {len(v)}" for k, v in texts.items() if len(v) > MAX_HELP_CHARACTERS]
    assert not long, f"{long}: shorten the first paragraph; a second one is not in the help"


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
    titles = [line for line in printed.splitlines() if line in GROUPS]
    assert titles == [title for title in GROUPS if title in titles]
    assert titles[:4] == ["Model", "Data", "LoRA", "Training"]
    assert titles[-2:] == ["Output", "Device and memory"]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_page_fits_the_terminal(
    command: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    build_app(chosen=command)([command, "--help"], result_action="return_value")
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if len(line) > columns]
    assert not [line for line in lines if line.strip() in ("8]", "0]", "on]", "false]")]


def test_a_switch_is_one_entry_and_a_list_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    build_app(chosen="finetune")(["finetune", "--help"], result_action="return_value")
    printed = capsys.readouterr().out
    assert "--[no-]packing" in printed
    assert "--no-packing" not in printed
    assert "[assistant|all, default: assistant]" in " ".join(printed.split())
    assert "--layers INT,..." in printed
    assert "--rank-pattern NAME=VALUE,..." in printed
