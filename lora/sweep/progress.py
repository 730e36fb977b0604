"""Progress reporting of a sweep: a live table of its candidates, or nothing. No torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from lora.runs.progress import never_raising
from lora.runs.sweep_record import CandidateState, rank
from lora.sweep.grid import SHORT_NAMES, short_number
from lora.terminal import build_console

if TYPE_CHECKING:
    from rich.table import Table

_LINE_EVERY_S = 10
_DEFAULT_HEIGHT = 20
"""Lines of a terminal that does not report its height."""


class SweepProgress(Protocol):
    """Callbacks for a sweep's start, steps, evaluations, messages and end."""

    def start(self, names: Sequence[str]) -> None:
        """Called when a sweep starts; `names` are those of the settings that vary."""

    def step(self, title: str, states: Sequence[CandidateState]) -> None:
        """Called after each step of the candidates that train."""

    def evaluated(self, title: str, states: Sequence[CandidateState]) -> None:
        """Called after each evaluation of the candidates that train."""

    def message(self, message: str) -> None:
        """Called with one line of text for the user."""

    def stop(self) -> None:
        """Called when the sweep ends, also after an error."""


class NoSweepProgress:
    """A SweepProgress that shows nothing."""

    def start(self, names: Sequence[str]) -> None:
        pass

    def step(self, title: str, states: Sequence[CandidateState]) -> None:
        pass

    def evaluated(self, title: str, states: Sequence[CandidateState]) -> None:
        pass

    def message(self, message: str) -> None:
        pass

    def stop(self) -> None:
        pass


class KeptMessages(NoSweepProgress):
    """Of a process that is not rank 0: shows nothing, and keeps the messages for rank 0."""

    def __init__(self) -> None:
        self._kept: list[str] = []

    def message(self, message: str) -> None:
        self._kept.append(message)

    def take(self) -> list[str]:
        """Return the messages since the last call."""
        kept, self._kept = self._kept, []
        return kept


class RichSweepProgress:
    """A live table on standard error, the best candidate first.

    If standard error is not a terminal, prints a plain line every ten seconds and the best
    candidate at each evaluation instead.
    """

    def __init__(self) -> None:
        from rich.live import Live

        self.console = build_console(never_raising(sys.stderr))
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._names: Sequence[str] = ()
        self._last_s = 0.0

    def start(self, names: Sequence[str]) -> None:
        self._names, self._last_s = names, time.monotonic()
        if self.console.is_terminal:
            self._live.start()

    def step(self, title: str, states: Sequence[CandidateState]) -> None:
        every_s = 0.2 if self.console.is_terminal else _LINE_EVERY_S
        if time.monotonic() - self._last_s < every_s:
            return
        self._last_s = time.monotonic()
        if self.console.is_terminal:
            self._show(title, states)
        else:
            self.console.print(f"sweep · {title}", markup=False)

    def evaluated(self, title: str, states: Sequence[CandidateState]) -> None:
        if self.console.is_terminal:
            self._show(title, states)
            return
        leader = rank(states)[0]
        if leader.eval_loss is not None:
            best = f"best: {leader.name}, validation loss {leader.eval_loss:.4f}"
            self.console.print(f"sweep · {title} · {best}", markup=False)

    def message(self, message: str) -> None:
        self.console.print(message, markup=False)

    def stop(self) -> None:
        self._live.stop()

    def _show(self, title: str, states: Sequence[CandidateState]) -> None:
        height = self.console.height or _DEFAULT_HEIGHT
        table = candidates_table(states, self._names, most=max(3, height - 6))
        table.caption = title
        self._live.update(table, refresh=True)


def candidates_table(
    states: Sequence[CandidateState], names: Sequence[str], most: int | None = None
) -> Table:
    """Return a table of candidates, the best first; `names` are the settings to show.

    The reason of one that failed is not in it: a long text would take the numbers' room.
    """
    from rich.table import Table

    table = Table(title_justify="left", caption_justify="left")
    table.add_column("#", justify="right")
    for name in names:
        table.add_column(SHORT_NAMES.get(name, name), justify="right")
    for title in ("step", "loss", "validation", "best (step)"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    ranked = rank(states)
    for place, state in enumerate(ranked[:most], start=1):
        values = [_format_value(state.settings[name]) for name in names]
        row = [str(place), *values, str(state.step), *format_losses(state)]
        table.add_row(*row, state.status, style=_STYLES.get(state.status, ""))
    if most is not None and len(ranked) > most:
        table.add_row("…", *[""] * (len(names) + 4), f"{len(ranked) - most} more")
    return table


def _format_value(value: object) -> str:
    return short_number(value) if isinstance(value, float) else str(value)


def format_losses(state: CandidateState) -> Sequence[str]:
    """Return training, validation and best validation loss (and its step) for a table."""
    at = "" if state.best_step is None else f" ({state.best_step})"
    losses = (state.loss, state.eval_loss, state.best_eval_loss)
    loss, eval_loss, best = ("" if value is None else f"{value:.4f}" for value in losses)
    return loss, eval_loss, best + at


def format_status(state: CandidateState) -> str:
    """Return the status, with its reason where there is one."""
    return f"{state.status}: {state.reason}" if state.reason else state.status


_STYLES = {"training": "bold", "waiting": "dim", "stopped": "dim", "failed": "red"}
