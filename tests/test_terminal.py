"""What reaches the terminal: escapes, lengths, brackets, narrow encodings, broken outputs."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora import cli
from lora.terminal import (
    MAX_MESSAGE_CHARACTERS,
    build_console,
    end_output,
    escaping_log,
    printable_answer,
    printable_json,
    repeats_dropped,
    shortened,
    visible,
)


def run_lora(
    *words: str, encoding: str = "utf-8", stdout: object = None
) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m lora` with standard streams of this encoding."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    out = subprocess.PIPE if stdout is None else stdout
    command = [sys.executable, "-m", "lora", *words]
    return subprocess.run(command, stdout=out, stderr=subprocess.PIPE, env=environment, check=False)  # type: ignore[call-overload,no-any-return]


def test_control_characters_and_lone_surrogates_are_escaped() -> None:
    assert visible("a\x1b[2J\x07\udcff\u202eb\n") == "a\\x1b[2J\\x07\\udcff\\u202eb\n"


def test_a_long_message_keeps_its_beginning_and_its_advice() -> None:
    text = shortened("begin" + "x" * 10**6 + "advice")
    assert len(text) < MAX_MESSAGE_CHARACTERS + 100
    assert text.startswith("begin")
    assert text.endswith("advice")
    assert "characters left out" in text


def test_a_console_parses_no_markup_and_escapes_cells() -> None:
    from rich.table import Table

    file = io.StringIO()
    console = build_console(file)
    table = Table(title="[/INST]\x1b]")
    table.add_column("[red]")
    table.add_row("[/b]:smile:")
    console.print("[/INST] [bold]", table)
    seen = file.getvalue()
    assert all(text in seen for text in ("[/INST]\\x1b]", "[red]", "[/b]:smile:", "[bold]"))


def test_errors_are_escaped_and_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "gone\x1b[2J" + "x" * 10_000]) == 2
    assert cli.main(["\x1b[2J" + "y" * 10**6]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert len(err) < 3 * MAX_MESSAGE_CHARACTERS


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
@pytest.mark.parametrize("words", [["--help"], ["finetune", "--help"], ["data", "gone–ü😀"]])
def test_a_narrow_console_gets_replacements(encoding: str, words: list[str]) -> None:
    done = run_lora(*words, encoding=encoding)
    assert b"Traceback" not in done.stderr
    assert done.returncode == (2 if "data" in words else 0)


def test_an_output_that_cannot_be_written_is_told() -> None:
    with open("/dev/full", "wb") as full:
        done = run_lora("--help", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith(b"lora: Cannot write the output: No space left")
    assert b"Traceback" not in done.stderr


def test_an_answer_is_escaped_on_a_terminal_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = "a\x1b]0;title\x07\tb\r\n"
    assert printable_answer(answer) == answer  # captured: no terminal
    main, terminal = os.openpty()
    with os.fdopen(terminal, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert printable_answer(answer) == "a\\x1b]0;title\\x07\tb\\r\n"
        monkeypatch.undo()
    os.close(main)


def test_json_keeps_its_values_without_control_characters() -> None:
    row = {"answer": "a\x9b2J\x7f\u202e\udcff\n–"}
    text = printable_json(json.dumps(row, ensure_ascii=False))
    assert not any(c in text for c in "\x9b\x7f\u202e\udcff\n")
    assert json.loads(text) == row


def test_messages_of_the_log_are_escaped_for_every_handler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = escaping_log("lora.test")
    assert escaping_log("lora.test") is log
    with caplog.at_level(logging.WARNING):
        log.warning("%s is %d", "a\x1b[2J" + "x" * 10**5, 3)
    (message,) = caplog.messages
    assert message.startswith("a\\x1b[2J")
    assert message.endswith("is 3")
    assert len(message) < MAX_MESSAGE_CHARACTERS + 100


@pytest.mark.parametrize("where", [">/dev/full", "2>/dev/full", ">&- 2>&-"])
def test_a_stream_that_cannot_be_flushed_leaves_the_exit_code(where: str) -> None:
    code = "import sys\nfrom lora.terminal import end_output\nsys.stdout.write('x')\n"
    code += "sys.stderr and sys.stderr.write('x')\nend_output()\nsys.exit(3)"
    if where.startswith(">&-"):
        code = code.replace("sys.stdout.write", "sys.stdout and sys.stdout.write")
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = ["bash", "-c", f'"{sys.executable}" -c "{code}" {where}']
    assert subprocess.run(command, env=buffered, check=False).returncode == 3


def test_a_closed_stream_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO())
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    end_output()
    monkeypatch.undo()


def test_a_file_that_is_cut_while_it_is_mapped_says_where_it_was_read(tmp_path: Path) -> None:
    code = """
import mmap, os, sys
import lora.cli
def read_weights(words):
    with open(sys.argv[1], "r+b") as file:
        data = mmap.mmap(file.fileno(), 0)
        os.truncate(sys.argv[1], 0)
        return data[0]
lora.cli._run = read_weights
lora.cli.main(["finetune"])
"""
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(10_000))
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr
    assert "in read_weights" in done.stderr


def test_a_warning_that_repeats_is_printed_once_by_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log = escaping_log("lora.trial")
    for _ in range(2):  # two commands
        with repeats_dropped():
            for _ in range(3):
                log.warning("%d tensors are not adapted", 4)
            log.warning("5 tensors are not adapted")
    shown = capsys.readouterr().err.splitlines()
    assert shown == 2 * ["4 tensors are not adapted", "5 tensors are not adapted"]
    assert not logging.getLogger("lora").handlers


def test_a_program_with_a_handler_of_its_own_gets_each_warning_from_that(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    log = escaping_log("lora.trial")
    with repeats_dropped():  # pytest's handlers are on the root logger
        for _ in range(3):
            log.warning("4 tensors are not adapted")
    assert caplog.messages == 3 * ["4 tensors are not adapted"]
    assert capsys.readouterr().err == ""
