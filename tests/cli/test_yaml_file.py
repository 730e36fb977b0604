"""Settings from a file: each flag of each command, and what is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from cyclopts.argument import Argument

from lora import cli
from lora.cli import COMMANDS, build_app
from lora.cli.flags.yaml_file import MAX_SETTINGS_BYTES, read_settings
from lora.errors import ConfigError


@functools.cache
def flags() -> list[tuple[str, Argument]]:
    """Return every flag of every command, with the command's name."""
    found = []
    app = build_app()
    for command in COMMANDS:
        with app.app_stack([command]):
            for argument in app[command].assemble_argument_collection():
                if argument.name != "*":
                    found.append((command, argument))
    return found


def value_for(hint: Any, default: object) -> Any:
    """Return a value that the flag takes and that is not its default."""
    choices = get_args(hint)
    origin = get_origin(hint)
    if isinstance(default, bool) or hint is bool:
        return not default
    if origin is dict:
        return {"q_proj": value_for(choices[1], None)}
    if origin in (list, tuple):
        return [value_for(choices[0], None)]
    if choices and all(isinstance(each, str) for each in choices):
        return next(each for each in choices if each != default)
    if choices:
        return value_for(choices[0], default)
    return {int: 3, float: 0.25, str: "data", Path: "report"}[hint]


@pytest.mark.parametrize(
    ("command", "argument"), flags(), ids=lambda each: getattr(each, "name", each)
)
def test_every_flag_of_every_command_works_from_a_file(
    command: str, argument: Argument, tmp_path: Path
) -> None:
    flag = argument.name.removeprefix("--")
    given = value_for(argument.hint, argument.field_info.default)
    needed = {"data": "x", "adapter": "x", "out": "x", "path": "x", "run": "x"}
    needed |= {"to": "slurm", "devices": "2"}
    names = {each.name.removeprefix("--"): each for c, each in flags() if c == command}
    content = {k: v for k, v in needed.items() if k in names and names[k].required}
    content[flag.replace("-", "_")] = given
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(content))
    app = build_app(command, [(read_settings(file), str(file))])
    _, bound, _ = app.parse_args([command], exit_on_error=False, print_error=False)
    seen = found_in(bound, flag.replace("-", "_"))
    expected = Path(given) if isinstance(seen, Path) else given
    assert (list(seen) if isinstance(seen, tuple) else seen) in (expected, [Path("report")]), seen


def found_in(bound: inspect.BoundArguments, name: str) -> Any:
    """Return the value of a flag among a call's arguments, also in a dataclass of them."""
    for key, value in bound.arguments.items():
        if dataclasses.is_dataclass(value):
            if name in vars(value):
                return vars(value)[name]
        elif key == name:
            return value
    raise AssertionError(f"{name} is dropped")


@pytest.mark.parametrize("command", COMMANDS)
def test_names_of_commands_are_no_settings(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {argument.name.removeprefix("--") for c, argument in flags() if c == command}
    for name in sorted(set(COMMANDS) - own):
        file = tmp_path / "settings.yaml"
        file.write_text(f"{name}: 3\n")
        assert cli.main([command, "--config", str(file)]) == 2
        assert f"unknown setting {name!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rank: 4\nrank: 5", "line 2: 'rank' is given twice"),
        ("batch_size: 3\nbatch-size: 4", "'batch-size' is given twice (as 'batch_size')"),
        ("rank_pattern: {q: 4, q: 5}", "'q' is given twice"),
        ("a: &a [*a]", "line 1: the value refers to itself"),
        ("rank_pattern: &a\n  q: {b: *a}", "refers to itself"),
        ("--rank: 3", "'--rank' has leading dashes. Write 'rank'"),
        ("? [a]\n: 3", "a name must be a text"),
        ("a: &a {b: 3}\nc:\n  <<: *a", "'<<' is not supported"),
        ("rank: 1\nbroken", "not valid YAML"),
        ("x" * (MAX_SETTINGS_BYTES + 1), "longer than 1,048,576 bytes"),
    ],
)
def test_what_is_not_clear_is_refused_by_name(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as seen:
        read_settings(file)
    assert words in str(seen.value)


def test_aliases_that_multiply_are_stopped(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    file = tmp_path / "settings.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="more than 10,000 values"):
        read_settings(file)


def test_values_are_texts_as_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(
        b"\xef\xbb\xbfname: 2024-01-01\nseed: 010\nrate: 1e-3\nmodel: null\nx: [y, 1]\n"
    )
    expected = {"name": "2024-01-01", "seed": "010", "rate": "1e-3", "model": None, "x": ["y", "1"]}
    assert read_settings(file) == expected


GROUPED = """\
data:
  data: {data}
  cutoff_len: 64
lora:
  r: 4
  rank_pattern: {{q_proj: 2}}
training: {{steps: 5, lr: 1e-3}}
evaluation:
device: {{device: cpu}}
"""


@pytest.mark.parametrize("words", [["{file}"], ["--config", "{file}"]])
def test_settings_may_stand_under_their_groups(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(GROUPED.format(data="x.jsonl"))
    seen: list[Any] = []
    monkeypatch.setattr("lora.finetune.run.finetune", lambda job, *_, **__: seen.append(job) or 1)
    with pytest.raises(AttributeError):  # there is no result to report
        cli.main(["finetune", *(word.format(file=file) for word in words), "--steps", "6"])
    (job,) = seen
    assert (job.data, job.data_config.max_length) == (Path("x.jsonl"), 64)
    assert (job.lora.rank, job.lora.rank_pattern) == (4, {"q_proj": 2})
    assert (job.train.steps, job.train.learning_rate, job.run.device) == (6, 1e-3, "cpu")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("training: {rank: 4}", "'rank' belongs under 'lora', not under 'training'"),
        ("model: {name: x}", "'name' belongs under 'output', not under 'model'"),
        ("training: {lora_r: 4}", "'lora_r' belongs under 'lora'"),
        ("rank: 4\nlora: {rank: 5}", "'rank' is given twice"),
        ("lora: {batch_size: 4, batch-size: 5}", "belongs under 'training'"),
        ("lora: {rank: 4, r: 5}", "r is rank: both are given"),
        ("lora: {rnak: 4}", "unknown setting 'rnak'. Did you mean 'rank'?"),
        ("trainig: {steps: 4}", "unknown setting 'trainig'. Did you mean"),
        ("lora: 4", "unknown setting 'lora'"),
    ],
)
def test_what_stands_under_another_group_is_refused(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yml"
    file.write_text(f"data: x\n{content}\n")
    assert cli.main(["finetune", str(file)]) == 2
    assert words in capsys.readouterr().err


def test_a_group_without_settings_under_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("lora: 5\n")
    assert cli.main(["finetune", str(path), "--data", "a.jsonl"]) == 2
    assert "unknown setting 'lora'. This is a group" in capsys.readouterr().err
