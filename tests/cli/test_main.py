"""The command line's frame: help, versions, settings from files, errors and exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora import __version__, cli
from lora.errors import DataError

COMMAND = '''
from dataclasses import dataclass, field
from typing import Annotated
from cyclopts import Parameter
from lora.errors import DataError

@dataclass(frozen=True)
class Settings:
    rank: int = 8
    """The rank."""
    learning_rate: float | None = None
    """The rate."""
    exclude: tuple[str, ...] = ()
    """Left alone."""
    pattern: dict[str, int] = field(default_factory=dict)
    """By name."""

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


@pytest.mark.usefixtures("commands")
def test_empty_defaults_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "--help"]) == 0
    out = capsys.readouterr().out
    assert "[default: 8]" in out
    assert out.count("[default:") == 1


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
        ("a: [3", ["not valid YAML", "line 1"]),
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
        (["shwo"], ["Unknown command 'shwo'", "Did you mean 'show'?", "fail, show"]),
        (["--verison"], ["Unknown option '--verison'", "Did you mean '--version'?"]),
        (["show", "m", "--rnak", "3"], ["--rnak", "Did you mean --rank?"]),
        (["show", "m", "--nothing-like-it", "3"], ["--nothing-like-it", "`lora show --help`"]),
        (["show", "m", "--rank", "many"], ["--rank", "many", "int", "`lora show --help`"]),
        (["show", "m", "--rank"], ["--rank", "requires an argument", "`lora show --help`"]),
        (["show", "m", "two", "three"], ["Unexpected arguments of lora show: 'two three'"]),
        (["show", "m", "true"], ["'true'", "write --NAME=true, or --no-NAME"]),
        (["show"], ["model"]),
        (["show", "bad"], ["The model is bad. Take a good one."]),
        (["show", "m", "--config"], ["it takes one YAML file, 0 are given"]),
        (["show", "m", "--config", "a", "--config", "b"], ["it takes one YAML file, 2 are given"]),
        (
            ["show", "m", "--config", "gone.yaml"],
            ["Cannot read the settings gone.yaml: No such file"],
        ),
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
def test_misspelt_variables_are_named_together(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALM_SHOW_RNAK", "3")
    monkeypatch.setenv("LORALM_SHOW_LEARNING_RATES", "3")
    assert cli.main(["show", "m"]) == 2
    seen = capsys.readouterr().err
    assert "Cannot run lora show: it has no flags for these environment variables" in seen
    assert "LORALM_SHOW_RNAK. Did you mean 'LORALM_SHOW_RANK'?" in seen
    assert "LORALM_SHOW_LEARNING_RATES. Did you mean 'LORALM_SHOW_LEARNING_RATE'?" in seen
    assert "`lora show --help`" in seen


@pytest.mark.usefixtures("commands")
def test_variables_of_other_commands_and_of_the_library_are_left_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LORALM_CACHE", "LORALM_FAIL_RNAK", "LORALM_FORCE_BF16", "SHOW_RNAK"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("LORALM_SHOW_LEARNING_RATE", "0.5")
    assert cli.main(["show", "m"]) == 0
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("m 8 0.5\n")


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize("argv", [["--debug", "show", "bad"], ["show", "bad", "--debug"]])
def test_debug_lets_the_error_through(argv: list[str]) -> None:
    with pytest.raises(DataError, match="The model is bad"):
        cli.main(argv)


@pytest.mark.usefixtures("commands")
def test_a_command_decides_its_exit_code_and_an_interrupt_is_130(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["fail"]) == 1
    assert cli.main(["show", "interrupt"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.usefixtures("commands")
def test_an_error_that_is_not_ours_is_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str]) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["show", "m"])


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_help_is_what_nothing_asks_for(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith("Usage: lora COMMAND")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_is_there_and_explains_itself(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    module = cli.COMMANDS[command][0].split(":")[0]
    assert module.startswith("lora.cli."), "one module of lora/cli/ a command"
    assert cli.main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: lora {command}")


def run_lora(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m lora` as a user would."""
    command = [sys.executable, "-m", "lora", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_python_m_lora_is_the_command() -> None:
    done = run_lora("nonsense")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Unknown command 'nonsense'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_with_debug_shows_the_traceback() -> None:
    done = run_lora("nonsense", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "Unknown command 'nonsense'" in done.stderr


def test_python_m_lora_tells_its_version() -> None:
    done = run_lora("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"lora {__version__}")


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "flood.py").write_text(
        "def flood():\n    for n in range(10**6):\n        print(n)\n"
    )
    code = (
        "import sys; from lora import cli; cli.COMMANDS['flood'] = ('flood:flood', 'Flood.'); "
        "sys.exit(cli.main(['flood']))"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_path_that_the_system_refuses_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["eval", "9" * 400]) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize("way", ["flag", "file", "environment", "config"])
def test_a_tilde_in_a_path_is_the_home_directory(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made_up_commands.py").write_text(
        "from pathlib import Path\n"
        "def show(*, out: Path | None = None, text: str = '') -> None:\n"
        "    print(out, text)\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.yaml").write_text("out: ~/runs\ntext: ~/x\n")
    words = {
        "flag": ["--out=~/runs", "--text=~/x"],
        "file": ["--config", str(tmp_path / "s.yaml")],
        "environment": ["--text=~/x"],
        "config": ["--config=~/s.yaml"],
    }
    if way == "environment":
        monkeypatch.setenv("LORALM_SHOW_OUT", "~/runs")
    assert cli.main(["show", *words[way]]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "runs"), "~/x"]
    assert cli.main(["show", "--out=~nobody-of-this-name/x"]) == 2
    assert "the home directory that ~ means is not known" in capsys.readouterr().err


@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize("when", ["the command line", "a command"])
def test_an_interrupt_while_importing_is_clean(tmp_path: Path, when: str, swallows: bool) -> None:
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    if swallows:  # as packages with optional parts do
        kill = f"try:\n    {kill.replace(chr(10), '; ')}pass\nexcept BaseException:\n    pass\n"
    (tmp_path / "slow.py").write_text(kill + "def slow(): pass\n")
    early = "import slow" if when == "the command line" else "pass"
    code = (
        # Where the tests run in the background, SIGINT is ignored, and a subprocess inherits that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, lora.__main__ as entry, builtins; real = builtins.__import__\n"
        "def load(name, *rest, **given):\n"
        f"    if name == 'lora.cli': {early}\n"
        "    return real(name, *rest, **given)\n"
        "builtins.__import__ = load; sys.argv = ['lora', 'slow']\n"
        "def with_slow():\n"
        "    from lora import cli\n"
        "    cli.COMMANDS['slow'] = ('slow:slow', 'Slow.')\n"
        f"{'' if early == 'import slow' else 'with_slow()'}\n"
        "sys.exit(entry.main())\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "lora: interrupted\n")
