"""The commands after a run: real paths, quoted, taken by the command line as they are."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from lora.cli import build_app
from lora.cli.results.program import program
from lora.report.records.next_commands import next_commands


@pytest.mark.parametrize("name", ["orders", "my orders; rm x", "-dashed", "it's"])
@pytest.mark.parametrize("model", [None, "./llama 3", "owner/name"])
def test_a_shell_gives_each_command_back_and_lora_takes_it(name: str, model: str | None) -> None:
    for saved in (Path(name) / "adapter", Path("runs") / name / "model"):
        commands = next_commands(saved, model)
        assert commands[0].split()[1] == "generate"
        for command in commands:
            first, command_name, *words = shlex.split(command)
            assert first == "lora"
            app = build_app(chosen=command_name)
            _, bound, _ = app.parse_args(
                [command_name, *words], exit_on_error=False, print_error=False
            )
            given = {str(value) for value in bound.arguments.values()}
            assert any(Path(text) == saved for text in given)
            assert model is None or saved.name == "model" or model in given


def test_the_program_is_called_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "bin dir" / "lora"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert shlex.split(program()) == [str(script)]
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "lora"
    monkeypatch.setattr(sys, "argv", ["/site-packages/lora/__main__.py"])
    assert shlex.split(program()) == [sys.executable, "-m", "lora"]
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert program() == "lora"
