"""The command line's frame: help, versions, settings from files, errors and exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora import __version__, cli
from lora.errors import DataError

COMMAND = '''
from dataclasses import dataclass
from typing import Annotated
from cyclopts import Parameter
from lora.errors import DataError

@dataclass(frozen=True)
class Settings:
    rank: int = 8
    """The rank."""
    learning_rate: float | None = None
    """The rate."""

def show(model: str, *, settings: Annotated[Settings, Parameter(name="*")] = Settings()) -> None:
    """Show."""
    if model == "bad":
        raise DataError("The model is bad. Take a good one.")
    if model == "interrupt":
        raise KeyboardInterrupt
    print(model, settings.rank, settings.learning_rate)

def fail() -> int:
    """Fail."""
    return 1
'''


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the real commands by two of a throw-away module."""
    (tmp_path / "made_up_commands.py").write_text(COMMAND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "made_up_commands", raising=False)
    table = {
        "show": ("made_up_commands:show", "Show what was asked."),
        "fail": ("made_up_commands:fail", "Fail."),
    }
    monkeypatch.setattr(cli, "COMMANDS", table)


@pytest.mark.usefixtures("commands")
def test_help_lists_the_commands_without_importing_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "Show what was asked." in out
    assert "--config FILE.yaml" in out
    assert "made_up_commands" not in sys.modules


@pytest.mark.usefixtures("commands")
def test_a_commands_help_names_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--learning-rate" in out
    assert "LORALM_COMMAND_FLAG" in out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"lora {__version__}"


@pytest.mark.usefixtures("commands")
def test_a_flag_beats_the_environment_which_beats_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("rank: 2\nlearning_rate: 0.5\n")
    assert cli.main(["show", "m", "--config", str(file)]) == 0
    monkeypatch.setenv("LORALM_SHOW_RANK", "3")
    assert cli.main(["show", "m", f"--config={file}"]) == 0
    assert cli.main(["show", "m", "--config", str(file), "--rank", "4"]) == 0
    assert capsys.readouterr().out.split("\n")[:3] == ["m 2 0.5", "m 3 0.5", "m 4 0.5"]


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rnak: 2", ["unknown setting 'rnak'", "Did you mean 'rank'?", "learning-rate, model"]),
        ("rank: many", ["rank", "many", "int"]),
        ("- 3", ["name: value"]),
        ("", ["name: value"]),
        ("a: [3", ["no YAML", "line 1"]),
    ],
)
def test_a_faulty_file_of_settings_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: list[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    assert cli.main(["show", "m", "--config", str(file)]) == 2
    seen = capsys.readouterr().err
    assert all(word in seen for word in [*words, "settings.yaml"]), seen


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["shwo"], ["no command 'shwo'", "Did you mean 'show'?", "fail, show"]),
        (["--verison"], ["no option '--verison'", "Did you mean '--version'?"]),
        (["show", "m", "--rnak", "3"], ["--rnak", "Did you mean --rank?"]),
        (["show", "m", "--rank", "many"], ["--rank", "many", "int"]),
        (["show"], ["model"]),
        (["show", "bad"], ["The model is bad. Take a good one."]),
        (["show", "m", "--config"], ["--config takes one YAML file, and 0 were given"]),
        (["show", "m", "--config", "a", "--config", "b"], ["and 2 were given"]),
        (["show", "m", "--config", "gone.yaml"], ["gone.yaml cannot be read", "No such file"]),
    ],
)
def test_a_users_error_is_one_message_and_exit_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lora: ")
    assert "Traceback" not in captured.err
    assert all(word in captured.err for word in words), captured.err


@pytest.mark.usefixtures("commands")
def test_debug_lets_the_error_through() -> None:
    with pytest.raises(DataError, match="The model is bad"):
        cli.main(["show", "bad", "--debug"])


@pytest.mark.usefixtures("commands")
def test_a_command_decides_its_exit_code_and_an_interrupt_is_130(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["fail"]) == 1
    assert cli.main(["show", "interrupt"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_python_m_lora_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no command 'nonsense'" in done.stderr
