"""Ctrl-C, SIGTERM and SIGHUP: a run saves and stops, at once after a second; writing cleans up."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lora.errors import Interrupted

SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
"""SIGHUP comes when an ssh connection or a terminal is gone; Windows has none."""

LAUNCHER_VARIABLE = "TORCHELASTIC_RUN_ID"
"""In the environment of a process that a launcher of PyTorch started."""
REPEAT_S = 2.0
"""Under a launcher: a scheduler sends a signal to all processes, and the launcher passes it on."""


class StopRequests:
    """Context manager that catches `SIGNALS`; `received` is the first signal, or None.

    A second signal raises KeyboardInterrupt (SIGINT) or SystemExit(128 + its number) wherever the
    run is; under a launcher one that comes within `REPEAT_S` is the first one again. A SIGHUP that
    is ignored, as under nohup, stays ignored. Outside the main thread, where Python allows no
    signal handlers, it does nothing.
    """

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self.received: signal.Signals | None = None
        self._received_s = 0.0
        self._on_message = on_message
        self._former: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + (self.received or 0)

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                is_ignored = signal.getsignal(number) is signal.SIG_IGN
                if not (is_ignored and number.name == "SIGHUP"):
                    self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            if signal.getsignal(number) == self._receive:  # nobody has set another meanwhile
                signal.signal(number, former)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            since_s = time.monotonic() - self._received_s
            if LAUNCHER_VARIABLE in os.environ and since_s < REPEAT_S:
                return
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.received, self._received_s = signal.Signals(number), time.monotonic()
        name = self.received.name
        self._on_message(f"{name}: finishing the step and saving; a second one exits at once")


class _Terminated(SystemExit):
    """Raised where a signal arrived; no library catches it by accident, as it is no Exception."""


@contextlib.contextmanager
def exit_on_signals(what: str) -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that `what` is cleaned up; Interrupted is raised then.

    A handler that somebody else has set stays in charge, as does Python's own for Ctrl-C. Outside
    the main thread it does nothing.
    """
    former: list[signal.Signals] = []

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated(128 + number)

    if threading.current_thread() is threading.main_thread():
        former = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in former:
        signal.signal(number, stop)
    try:
        yield
    except _Terminated as error:
        if not former:
            raise  # of an outer one, which says what was stopped
        code = int(str(error.code))
        name = signal.Signals(code - 128).name
        raise Interrupted(f"{name}: stopped {what}; nothing of it is left.", code) from None
    finally:
        for number in former:
            signal.signal(number, signal.SIG_DFL)
