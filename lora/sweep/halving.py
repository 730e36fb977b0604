"""Which candidates train next: successive halving (arXiv 1502.07943). No torch here.

A rung is a step at which all candidates that are left have been evaluated. Without halving there is
one, the last step. With halving the worse half stops at a quarter and at half of the steps, which
frees their slots in the stack for the others. A candidate that is kept continues its training
where it stopped: its final values do not depend on how often it was paused.
"""

from __future__ import annotations

import math

from lora.runs.sweep_record import CandidateState, SweepRecord, loss_order

HALVING_FRACTIONS = (0.25, 0.5)
"""Of a candidate's steps: where the worse half stops."""


def find_rungs(steps: int, *, halving: bool) -> tuple[int, ...]:
    """Return the steps at which candidates are compared; the last is `steps`."""
    points = {round(fraction * steps) for fraction in HALVING_FRACTIONS} if halving else set()
    return (*sorted(point for point in points if 0 < point < steps), steps)


def next_group(record: SweepRecord, n_processes: int = 1) -> tuple[list[int], int] | None:
    """Return which candidates train next, by index, and to which step; None at the end.

    Each of several processes trains a part of them. Call `halve_reached_rungs` first.
    """
    for rung in record.rungs:
        left = [n for n, c in enumerate(record.candidates) if c.is_alive and c.step < rung]
        if left:
            # Candidates in a stack take their steps together, and a wave that was split left some
            # half-way: only candidates at the same step can share a wave.
            step = record.candidates[left[0]].step
            alike = [n for n in left if record.candidates[n].step == step]
            return alike[: record.at_once * n_processes], rung
    return None


def halve_reached_rungs(record: SweepRecord) -> list[CandidateState]:
    """Stop the worse half at each rung that all candidates have reached; return those it stopped.

    Changes `record` in place. A rung that was halved before is not halved again.
    """
    stopped: list[CandidateState] = []
    for rung in record.rungs[:-1]:
        if any(c.is_alive and c.step < rung for c in record.candidates):
            break
        stopped += _halve(record.candidates, rung)
    return stopped


def _halve(candidates: list[CandidateState], rung: int) -> list[CandidateState]:
    """Stop the worse half of the candidates at `rung`; the better half, rounded up, is kept."""
    has_moved_on = any(c.is_alive and c.step > rung for c in candidates)
    if has_moved_on or any(c.stopped_at == rung for c in candidates):
        return []  # halved before, in this process or in the one that is resumed
    ranked = sorted((c for c in candidates if c.is_alive and c.step == rung), key=loss_order)
    stopped = ranked[math.ceil(len(ranked) / 2) :]
    for place, candidate in enumerate(stopped, start=len(ranked) - len(stopped) + 1):
        candidate.stop(rung, f"halving at step {rung}: place {place} of {len(ranked)}")
    return stopped
