"""Messages about a run: they never stop it."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from lora.runs.progress import LogStream, RichProgress
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
