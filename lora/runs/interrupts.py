"""Ctrl-C and SIGTERM during a run: the first stops it after saving, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """Context manager that catches SIGINT and SIGTERM; `received` is the first signal, or None.

    A second signal raises KeyboardInterrupt (SIGINT) or SystemExit(143) (SIGTERM) wherever the run
    is. Outside the main thread, where Python allows no signal handlers, it does nothing.
    """

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self.received: signal.Signals | None = None
        self._on_message = on_message
        self._former: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + (self.received or 0)

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.received = signal.Signals(number)
        name = self.received.name
        self._on_message(f"{name}: finishing the step and saving; a second one exits at once")
