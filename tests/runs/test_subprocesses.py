"""A function in a subprocess: what it returns, reports and raises, and how it ends."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora.errors import DataError, Interrupted, TrainingError
from lora.runs import subprocesses
from lora.runs.progress import NoProgress
from lora.runs.subprocesses import run_in_subprocess

TASKS = """
import os, resource, signal
from lora.errors import DataError, Interrupted

def add(a, b, progress):
    progress.start(2, 0)
    progress.step(1, 0.5, 10.0, 100)
    progress.message("half")
    progress.stop()
    return a + b, os.getpid(), os.getpgid(0)

def refuse(progress):
    raise DataError("these data cannot be used")

def stop(progress):
    raise Interrupted("stopped after step 3", 143)

def fail(progress):
    return {}["nothing"]

def die(progress):
    os.kill(os.getpid(), signal.SIGKILL)

def grow(n_bytes, progress):
    return len(b"x" * n_bytes), int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


class Heard(NoProgress):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def start(self, total_steps: int, done_steps: int) -> None:
        self.heard.append((total_steps, done_steps))

    def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        self.heard.append((step, loss, tokens_per_s, memory_bytes))

    def message(self, message: str) -> None:
        self.heard.append(message)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that the child can import: spawned processes get our path."""
    (tmp_path / "tasks_in_subprocess.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.reload(importlib.import_module("tasks_in_subprocess"))


def test_it_returns_and_is_heard(tasks: ModuleType) -> None:
    heard = Heard()
    total, number, group = run_in_subprocess(tasks.add, 2, 3, progress=heard)
    assert total == 5
    assert number != os.getpid()
    assert group == number  # Ctrl-C of the terminal does not reach it
    assert heard.heard == [(2, 0), (1, 0.5, 10.0, 100), "half"]


def test_errors_are_what_they_were_there(tasks: ModuleType) -> None:
    with pytest.raises(DataError, match="cannot be used"):
        run_in_subprocess(tasks.refuse, progress=NoProgress())
    with pytest.raises(Interrupted, match="after step 3") as stopped:
        run_in_subprocess(tasks.stop, progress=NoProgress())
    assert stopped.value.exit_code == 143
    with pytest.raises(RuntimeError, match="KeyError"):
        run_in_subprocess(tasks.fail, progress=NoProgress())


def test_a_process_that_dies_is_told(tasks: ModuleType) -> None:
    with pytest.raises(TrainingError, match=r"SIGKILL: it may have run out of memory"):
        run_in_subprocess(tasks.die, progress=NoProgress())


def test_one_peak_is_not_the_next_one_s(tasks: ModuleType) -> None:
    _, large = run_in_subprocess(tasks.grow, 300_000_000, progress=NoProgress())
    _, small = run_in_subprocess(tasks.grow, 1, progress=NoProgress())
    assert large > 290_000
    assert small < large - 200_000


def test_a_signal_while_no_step_is_taken_ends_it(tasks: ModuleType) -> None:
    class Stops(NoProgress):
        def message(self, message: str) -> None:
            if message == "half":
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM") as stopped:
        run_in_subprocess(tasks.add, 1, 2, progress=Stops())
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_isolated_python_finds_an_editable_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(subprocesses.__file__).parents[2]
    monkeypatch.chdir(tmp_path)
    elsewhere = [entry for entry in sys.path if entry and Path(entry).resolve() != root]
    monkeypatch.setattr(sys, "path", elsewhere)  # as of `pip install -e`, called in another folder
    code = "import sys; sys.path[:] = sys.argv[1:]; import lora.errors; print(lora.errors.__file__)"
    command = [sys.executable, "-I", "-S", "-c", code, *subprocesses.import_path()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()) == root / "lora" / "errors.py", done.stderr
