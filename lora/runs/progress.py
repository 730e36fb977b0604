"""Progress reporting of a run, or of a command in stages: a rich progress bar, or nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import IO, Protocol, TextIO, cast

from lora.terminal import build_console

LINE_INTERVAL_S = 10.0
"""Between two lines where standard error is no terminal."""
MEASURED_STEPS = 2
"""After the first: what the time left is estimated from at the start."""


class Progress(Protocol):
    """Callbacks for a run's start, steps, messages and end."""

    def start(self, total_steps: int, done_steps: int) -> None:
        """Called when a run of `total_steps` starts; a resumed one has `done_steps` behind it."""

    def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        """Called after step number `step` (the first is 1)."""

    def message(self, message: str) -> None:
        """Called with one line of text for the user."""

    def stop(self) -> None:
        """Called when the run ends, also after an error."""


class TokenRate(float):
    """Learned tokens per second, with the rate of all tokens beside it."""

    processed: float | None

    def __new__(cls, learned: float, processed: float | None = None) -> TokenRate:
        """`processed`: tokens per second, learned or not, padding left out; None: not known."""
        rate = super().__new__(cls, learned)
        rate.processed = processed
        return rate


def describe_rate(tokens_per_s: float) -> str:
    """Return a rate in words; of a TokenRate both."""
    processed = tokens_per_s.processed if isinstance(tokens_per_s, TokenRate) else None
    if processed is None:
        return f"{tokens_per_s:,.0f} tokens/s"
    return f"{processed:,.0f} tokens/s ({tokens_per_s:,.0f} learned)"


def duration_text(seconds: float) -> str:
    """Return a duration in words: 45 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class NoProgress:
    """A Progress that shows nothing."""

    def start(self, total_steps: int, done_steps: int) -> None:
        pass

    def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        pass

    def message(self, message: str) -> None:
        pass

    def stop(self) -> None:
        pass


def as_progress(given: Progress | bool | None, title: str) -> Progress:
    """Return `given`; for True a progress bar on standard error, for False and None nothing."""
    if given is True:
        return RichProgress(title)
    return NoProgress() if given is None or given is False else given


class RichProgress:
    """A progress bar on standard error: loss, tokens per second, memory and time left.

    If standard error is not a terminal, prints a plain line every ten seconds instead.
    """

    def __init__(self, title: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = build_console(never_raising(sys.stderr))
        self._title = title
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(),
        ]
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(title, total=None, figures="")
        self._total_steps = 0
        self._last_line_s = 0.0
        self._first: tuple[int, float] | None = None
        """The first step of this process, and when it was done: what it compiles is left out."""

    def start(self, total_steps: int, done_steps: int) -> None:
        self._total_steps, self._last_line_s = total_steps, time.monotonic()
        self._first = None
        self._bar.update(self._task, total=total_steps, completed=done_steps)
        if self.console.is_terminal:
            self._bar.start()

    def step(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        rate = describe_rate(tokens_per_s)
        figures = f"loss {loss:.3f} · {rate} · {memory_bytes / 1e9:.2f} GB"
        left_s = self._time_left(step)
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step, figures=figures)
        elif time.monotonic() - self._last_line_s > LINE_INTERVAL_S:
            self._last_line_s = time.monotonic()
            left = "" if left_s is None else f" · {duration_text(left_s)} left"
            self.console.print(f"{self._title} {step}/{self._total_steps} · {figures}{left}")

    def _time_left(self, step: int) -> float | None:
        """Return the seconds that the other steps will take; say so once, after a few steps."""
        now_s = time.monotonic()
        if self._first is None:
            self._first = step, now_s
        first, began_s = self._first
        if step <= first:
            return None
        step_s = (now_s - began_s) / (step - first)
        left_s = (self._total_steps - step) * step_s
        if step - first == MEASURED_STEPS and left_s > LINE_INTERVAL_S:
            self.message(
                f"estimated time: {duration_text(left_s)} for {self._total_steps - step:,} more "
                f"steps, {step_s:.2g} s each so far"
            )
        return left_s

    def message(self, message: str) -> None:
        self.console.print(message, markup=False)

    def stop(self) -> None:
        self._bar.stop()


class StageProgress:
    """A bar on standard error for what goes through parts of known number, stage by stage.

    Use it in a `with` statement. If standard error is not a terminal, prints a plain line every
    ten seconds instead.
    """

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console = build_console(never_raising(sys.stderr))
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        ]
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._stage, self._task = "", self._bar.add_task("", total=None, visible=False)
        self._last_line_s = time.monotonic()

    def __enter__(self) -> StageProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of the `total` parts of a stage are done."""
        if stage != self._stage:  # a new task: the time left is that of this stage
            self._bar.remove_task(self._task)
            self._stage, self._task = stage, self._bar.add_task(stage, total=total)
        self._bar.update(self._task, completed=done)
        if not self._console.is_terminal and time.monotonic() - self._last_line_s > LINE_INTERVAL_S:
            self._last_line_s = time.monotonic()
            self._console.print(f"{stage}: {done}/{total}")


class LogStream:
    """A text stream that never raises: what cannot be written is lost, and the run continues.

    The disk of a log may be full, the reader of a pipe gone, the terminal closed. rich would end
    the process with code 1 for some of these.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        """None: standard error was closed when Python started."""
        self.encoding = (stream and stream.encoding) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text`, or nothing; characters that the encoding lacks are written as escapes."""
        if self._stream is not None:
            known = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed meanwhile
                self._stream.write(known)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether a person watches it: decides between a bar and lines."""
        with contextlib.suppress(ValueError):
            return self._stream is not None and self._stream.isatty()
        return False


def never_raising(stream: TextIO | None) -> IO[str]:
    """Return `stream` as one that never raises, for messages about a run."""
    return cast(IO[str], LogStream(stream))
