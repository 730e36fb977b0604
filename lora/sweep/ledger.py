"""How each candidate of a sweep stands, on disk in `sweep.json`, and which go on next. No torch.

The candidates climb rungs: steps at which all that are left have been measured. Without halving
there is one, the last step. With halving the worse half stops at a quarter and at half of the
steps, so that a place in the stack is never spent on a candidate that others have left behind.
Each candidate that goes on is trained as it would be in one piece (successive halving, arXiv
1502.07943).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora.runs.directory import Run

LEDGER_FILE = "sweep.json"
HALVING_POINTS = (0.25, 0.5)
"""Shares of the steps after which the worse half stops."""

Status = Literal["waiting", "training", "stopped", "failed", "done"]


@dataclass
class CandidateState:
    """One candidate: how far it is and how well it does."""

    name: str
    settings: dict[str, Any]
    """Of the swept settings, by name."""
    status: Status = "waiting"
    step: int = 0
    reason: str = ""
    """Why it was stopped or failed."""
    loss: float | None = None
    """Of the last step, nats."""
    eval_loss: float | None = None
    """The newest held-out loss, nats."""
    best_eval_loss: float | None = None
    best_step: int | None = None
    row: int = 0
    """Rows of data that it has seen."""

    @property
    def is_alive(self) -> bool:
        """Whether it may be trained further."""
        return self.status in ("waiting", "training")

    def note_eval(self, loss: float) -> None:
        """Take in a held-out loss at the present step."""
        self.eval_loss = loss
        if self.best_eval_loss is None or loss < self.best_eval_loss:
            self.best_eval_loss, self.best_step = loss, self.step

    def fail(self, reason: str) -> None:
        """Drop it for `reason`."""
        self.status, self.reason = "failed", reason


@dataclass
class Ledger:
    """All candidates of a sweep."""

    states: list[CandidateState]
    rungs: tuple[int, ...]
    """Steps; the last is the sweep's."""
    at_once: int
    base_eval_loss: float | None = None
    """Of the model without an adapter."""
    steps_taken: int = 0
    """Of all stacks so far."""

    def next_group(self) -> tuple[list[int], int] | None:
        """Return who trains together next, and to which step; None when all is done.

        A rung that all have reached is judged on the way: see `halve`.
        """
        for rung in self.rungs:
            left = [n for n, s in enumerate(self.states) if s.is_alive and s.step < rung]
            if left:  # a wave that was split left some half-way: those that stand alike go on
                step = self.states[left[0]].step
                alike = [n for n in left if self.states[n].step == step]
                return alike[: self.at_once], rung
            if rung != self.rungs[-1]:
                self.halve(rung)
        return None

    def halve(self, rung: int) -> None:
        """Stop the worse half of those that stand at `rung`; the better half, rounded up, stays."""
        reached = [s for s in self.states if s.is_alive and s.step == rung]
        ranked = sorted(reached, key=_order)
        keep = math.ceil(len(ranked) / 2)
        passed = [s for s in self.states if s.is_alive and s.step > rung]
        if passed or any(s.reason.startswith(_stopped_at(rung)) for s in self.states):
            return  # was judged before
        for place, state in enumerate(ranked[keep:], start=keep + 1):
            state.status = "stopped"
            state.reason = f"{_stopped_at(rung)}: place {place} of {len(ranked)}"

    def ranked(self) -> list[CandidateState]:
        """Return all, the best first: see `rank`."""
        return rank(self.states)

    def best(self) -> CandidateState | None:
        """Return the finished candidate with the lowest held-out loss at the end."""
        done = [s for s in self.states if s.status == "done"]
        return min(done, key=_order, default=None)

    def write(self, run: Run) -> None:
        """Write `sweep.json`, whole or not at all."""
        run.write_json(LEDGER_FILE, {**vars(self), "states": [vars(s) for s in self.states]})


def read_ledger(values: dict[str, Any], names: Sequence[str]) -> Ledger:
    """Return the ledger that `Ledger.write` wrote of the candidates of these names.

    Raises ValueError, LookupError or TypeError if it is no such ledger.
    """
    states = [CandidateState(**s) for s in values["states"]]
    ledger = Ledger(**{**values, "states": states, "rungs": tuple(values["rungs"])})
    if [state.name for state in states] != list(names):
        raise ValueError("it lists other candidates")
    numbers = [*ledger.rungs, ledger.at_once, ledger.steps_taken]
    numbers += [number for s in states for number in (s.step, s.row)]
    if not all(type(number) is int and number >= 0 for number in numbers) or not ledger.at_once:
        raise ValueError("its numbers are none of steps")
    if {state.status for state in states} - set(get_args(Status)):
        raise ValueError(f"a candidate's status is none of {', '.join(get_args(Status))}")
    return ledger


def find_rungs(steps: int, *, halving: bool) -> tuple[int, ...]:
    """Return the steps at which candidates are judged; the last is `steps`."""
    points = {round(share * steps) for share in HALVING_POINTS} if halving else set()
    return (*sorted(point for point in points if 0 < point < steps), steps)


def rank(states: Iterable[CandidateState]) -> list[CandidateState]:
    """Return them the best first: by progress through the sweep, then by held-out loss.

    Those that failed come last, those that were stopped before them.
    """
    places: dict[Status, int] = {"done": 0, "training": 0, "waiting": 1, "stopped": 2, "failed": 3}
    return sorted(states, key=lambda s: (places[s.status], -_rung_of(s), *_order(s)))


def _rung_of(state: CandidateState) -> int:
    return state.step if state.status == "stopped" else 0


def _order(state: CandidateState) -> tuple[float, str]:
    loss = state.eval_loss
    return (math.inf if loss is None or math.isnan(loss) else loss, state.name)


def _stopped_at(rung: int) -> str:
    return f"halving at step {rung}"


def format_losses(state: CandidateState) -> Sequence[str]:
    """Return training, held-out and best held-out loss (and its step) as they are shown."""
    at = "" if state.best_step is None else f" ({state.best_step})"
    best = _loss(state.best_eval_loss) + at
    return _loss(state.loss), _loss(state.eval_loss), best


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
