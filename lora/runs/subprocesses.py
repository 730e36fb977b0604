"""Run a function in a subprocess of its own, with its progress reported here.

The subprocess is spawned, not forked, so that its peak memory is that of its work alone. It ends
when this process ends, even by SIGKILL, and a signal to this process stops it between two steps.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from lora import errors
from lora.errors import Interrupted, LoraError, TrainingError
from lora.runs.interrupts import StopRequests
from lora.runs.progress import Progress

T = TypeVar("T")
_POLL_S, _GRACE_S = 0.2, 5.0


def import_path() -> list[str]:
    """Return where an isolated Python (-I -S) finds this package and all that this one can import.

    An editable install is found by a hook of Python's start, which -S leaves out.
    """
    return [str(Path(__file__).parents[2]), *(entry or os.getcwd() for entry in sys.path)]


def run_in_subprocess(
    task: Callable[..., T],
    *arguments: Any,
    progress: Progress,
    environment: Mapping[str, str | None] | None = None,
) -> T:
    """Return `task(*arguments, progress)`, computed in a subprocess.

    Task, arguments and result are pickled: functions and classes of modules, no closures. In the
    subprocess the variables of `environment` have these values; None: they are not set. A
    LoraError of the task is raised here again. Raises TrainingError if the subprocess dies.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    changed = dict(environment or {})
    process = context.Process(target=_run_child, args=(theirs, task, arguments, changed))
    with StopRequests(progress.message) as stop:
        process.start()
        theirs.close()
        try:
            return _listen(process, ours, stop, progress)
        finally:
            if process.is_alive():
                process.terminate()
                process.join(_GRACE_S)
            if process.is_alive():
                process.kill()
            process.join()


def _listen(process: Any, ours: Connection, stop: StopRequests, progress: Progress) -> Any:
    """Pass the subprocess's progress on until it sends its result or an error."""
    is_terminated = False
    while True:
        if stop.received is not None and not is_terminated:
            process.terminate()  # it finishes its step and saves
            is_terminated = True
        if not wait([ours], timeout=_POLL_S):
            continue
        try:
            kind, value = ours.recv()
        except EOFError:
            process.join()
            raise _died(process.exitcode, stop) from None
        if kind == "progress":
            name, arguments = value
            _report_progress(progress, name, arguments)
        elif kind == "done":
            process.join()
            if stop.received is not None:  # it had no step left to be stopped at
                raise Interrupted(_stop_message(stop), stop.exit_code)
            return value
        else:
            raise _error(value, stop)


def _report_progress(progress: Progress, name: str, arguments: tuple[Any, ...]) -> None:
    callbacks: dict[str, Callable[..., None]] = {
        "start": progress.start,
        "step": progress.step,
        "message": progress.message,
        "stop": progress.stop,
    }
    callbacks[name](*arguments)


def _error(received: tuple[str, str, int], stop: StopRequests) -> Exception:
    """Return the subprocess's error as one to raise here."""
    name, message, exit_code = received
    if name == "Interrupted":
        code = stop.exit_code if stop.received is not None else exit_code
        return Interrupted(message, code)
    kind = vars(errors).get(name)
    if isinstance(kind, type) and issubclass(kind, LoraError):
        return kind(message)
    return RuntimeError(message)


def _died(exit_code: int | None, stop: StopRequests) -> LoraError:
    if stop.received is not None:
        return Interrupted(_stop_message(stop), stop.exit_code)
    why = f"with code {exit_code}"
    if exit_code is not None and exit_code < 0:
        why = f"by {signal.Signals(-exit_code).name}"
    advice = (
        "it may have run out of memory" if exit_code == -signal.SIGKILL else "see its output above"
    )
    return TrainingError(f"The subprocess ended {why}: {advice}.")


def _stop_message(stop: StopRequests) -> str:
    name = stop.received.name if stop.received is not None else ""
    return f"{name} stopped it outside of its training steps; finished parts are kept."


class _ParentProgress:
    """A Progress that sends every call to the parent process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def start(self, total_steps: int, done_steps: int) -> None:
        self._send("start", total_steps, done_steps)

    def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        self._send("step", step, loss, tokens_per_s, memory_bytes)

    def message(self, message: str) -> None:
        self._send("message", message)

    def stop(self) -> None:
        self._send("stop")

    def _send(self, name: str, *arguments: Any) -> None:
        self._connection.send(("progress", (name, arguments)))


def _run_child(
    connection: Connection,
    task: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str | None],
) -> None:
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
    threading.Thread(target=_die_with_parent, daemon=True).start()
    progress = _ParentProgress(connection)
    try:
        answer: tuple[str, Any] = ("done", task(*arguments, progress))
    except LoraError as error:
        code = error.exit_code if isinstance(error, Interrupted) else 2
        answer = ("error", (type(error).__name__, str(error), code))
    except (RuntimeError, MemoryError, OSError, ValueError, KeyError, TypeError):
        answer = ("error", ("RuntimeError", traceback.format_exc(), 1))
    connection.send(answer)
    connection.close()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # as if by SIGKILL: files are written whole or not at all
