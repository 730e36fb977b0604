"""Messages about a run: they never stop it."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys

import pytest

from lora.runs.progress import (
    LogStream,
    NoProgress,
    RichProgress,
    TokenRate,
    as_progress,
    describe_rate,
    duration_text,
)
from lora.sweep.progress import RichSweepProgress

CODE = """
from lora.runs.progress import RichProgress
from lora.sweep.progress import RichSweepProgress
for progress in (RichProgress("run"), RichSweepProgress()):
    for number in range(400):
        progress.message(f"message {number}")
    progress.stop()
print("saved")
"""


@pytest.mark.parametrize("kind", ["full", "gone", "closed"])
def test_a_broken_standard_error_stops_nothing(kind: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # whoever read the messages is gone
    where = {"full": "2>/dev/full", "gone": f"2>&{writer}", "closed": "2>&-"}[kind]
    command = f"\"{sys.executable}\" -c '{CODE}' {where}"
    done = subprocess.run(
        ["bash", "-c", command], stdout=subprocess.PIPE, text=True, pass_fds=(writer,)
    )
    os.close(writer)
    assert (done.stdout, done.returncode) == ("saved\n", 0)


def test_a_narrow_encoding_and_a_closed_stream_lose_no_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    narrow = io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stderr", narrow)
    for progress in (RichProgress("run"), RichSweepProgress()):
        progress.message("größer")
    assert raw.getvalue() == b"gr\\xf6\\xdfer\n" * 2
    narrow.close()
    stream = LogStream(narrow)
    assert stream.write("later") == 5
    stream.flush()
    assert not stream.isatty()


def test_the_bar_of_a_terminal_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    main, terminal = os.openpty()
    stream = os.fdopen(terminal, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    progress = RichProgress("run")
    assert progress.console.is_terminal
    progress.start(10, 0)
    os.close(main)  # what is written now is an I/O error
    for step in range(1, 11):
        progress.step(step, 1.0, 1.0, 1)
    progress.message("done")
    progress.stop()
    with pytest.raises(OSError, match="Input/output error"):
        stream.close()


def test_a_rate_has_both_kinds_of_tokens_in_a_subprocess_too() -> None:
    rate = copy.copy(TokenRate(430.0, 1200.0))  # as pickling it for another process does
    assert rate == 430.0
    assert describe_rate(rate) == "1,200 tokens/s (430 learned)"
    assert describe_rate(430.0) == describe_rate(TokenRate(430.0)) == "430 tokens/s"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5000, "83 min"), (7300, "2 h 2 min")],
)
def test_a_duration_has_units_of_its_size(seconds: float, expected: str) -> None:
    assert duration_text(seconds) == expected


def test_without_a_terminal_lines_say_how_much_time_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("lora.runs.progress.time.monotonic", lambda: clock[0])
    progress = RichProgress("finetune")
    progress.start(100, 40)
    clock[0] = 60.0  # the first step compiles
    for step in range(41, 47):
        progress.step(step, 1.5, TokenRate(10.0, 30.0), 10**9)
        clock[0] += 6.0
    progress.stop()
    err = " ".join(capsys.readouterr().err.split())
    assert "estimated time: 6 min for 57 more steps, 6 s each so far" in err
    assert "finetune 41/100 · loss 1.500 · 30 tokens/s (10 learned) · 1.00 GB finetune" not in err
    assert "finetune 43/100 · loss 1.500 · 30 tokens/s (10 learned) · 1.00 GB · 6 min left" in err
    assert err.count("estimated time") == 1


def test_true_is_a_bar_and_nothing_is_silent() -> None:
    assert isinstance(as_progress(True, "x"), RichProgress)
    assert isinstance(as_progress(None, "x"), NoProgress)
    assert isinstance(as_progress(False, "x"), NoProgress)
    own = NoProgress()
    assert as_progress(own, "x") is own
