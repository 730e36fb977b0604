"""What a person sees of a run while it goes on; the null object is for everything else."""

from __future__ import annotations

import sys
import time
from typing import Protocol


class Progress(Protocol):
    """Hears of a run's steps, evaluations and events."""

    def start(self, total_steps: int, done_steps: int) -> None:
        """A run of `total_steps` begins, `done_steps` of which were done before."""

    def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        """Step number `step` (the first is 1) is done."""

    def say(self, message: str) -> None:
        """Something worth a line has happened."""

    def stop(self) -> None:
        """The run is over, whichever way it ended."""


class NoProgress:
    """Says nothing."""

    def start(self, total_steps: int, done_steps: int) -> None:
        pass

    def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        pass

    def say(self, message: str) -> None:
        pass

    def stop(self) -> None:
        pass


class RichProgress:
    """A bar with loss, tokens a second, memory and time left, on standard error.

    Where standard error is no terminal, a plain line every ten seconds takes its place.
    """

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=sys.stderr, highlight=False)
        self._title = title
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        ]
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(title, total=None, figures="")
        self._total_steps = 0
        self._last_line_s = 0.0

    def start(self, total_steps: int, done_steps: int) -> None:
        self._total_steps, self._last_line_s = total_steps, time.monotonic()
        self._bar.update(self._task, total=total_steps, completed=done_steps)
        if self.console.is_terminal:
            self._bar.start()

    def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        figures = f"loss {loss:.3f} · {tokens_per_s:,.0f} tokens/s · {memory_bytes / 1e9:.2f} GB"
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step, figures=figures)
        elif time.monotonic() - self._last_line_s > 10:
            self._last_line_s = time.monotonic()
            self.console.print(f"{self._title} {step}/{self._total_steps} · {figures}")

    def say(self, message: str) -> None:
        self.console.print(message, markup=False)

    def stop(self) -> None:
        self._bar.stop()
