"""Reads a sweep's directory for the report: its candidates, the smallest rank that is enough."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora.report.records.command import sweep_command
from lora.report.records.reading import relative
from lora.report.records.records import GridCell, RunSummary, Status, SweepSummary, SweetSpot
from lora.report.records.runs import read_run
from lora.runs.read_record import read_run_record
from lora.runs.record import RUN_FILE, SweepSettings
from lora.runs.sweep_record import (
    CandidateState,
    SweepRecord,
    WaveTiming,
    rank,
    read_outcome,
    read_sweep_record,
    read_wave_timings,
)
from lora.runs.typed_json import Faults
from lora.sweep.grid import SWEPT, short_number

CANDIDATES, FULL = "candidates", "full"
"""Directories of the candidates, and of full fine-tuning beside them."""
NOISE_FRACTION = 0.01
"""Of the best loss: taken as noise where there is one seed only."""
_STATUSES: dict[str, Status] = {"done": "finished", "stopped": "stopped", "failed": "failed"}
_SHORT = {"rank": "r", "learning_rate": "", "alpha": "a", "dropout": "d", "seed": "s"}


def read_sweep(
    folder: Path, base: Path, name: str, faults: Faults
) -> tuple[SweepSummary, list[RunSummary]]:
    """Return the summary of the sweep in `folder`, and its candidates, the best first."""
    run_record = read_run_record(folder, faults)
    settings = run_record.sweep or SweepSettings({}, halving=False, steps=0)
    record = read_sweep_record(folder, faults)
    outcome = read_outcome(folder, faults)
    timings = read_wave_timings(folder, faults)
    swept = tuple(key for key in SWEPT if len(settings.grid.get(key, ())) > 1)
    candidates = rank(record.candidates) if record else []
    runs = [_candidate(folder, base, name, c, swept, faults) for c in candidates]
    runs.sort(key=_sort_key)
    full_rate = None
    if (folder / FULL / RUN_FILE).is_file():
        full = replace(read_run(folder / FULL, base, faults, group=name), label=FULL)
        full_rate = full.learning_rate
        runs.append(full)
    cells = find_grid_cells(runs)
    summary = SweepSummary(
        name=name,
        folder=relative(folder, base),
        status="finished" if outcome else "unfinished",
        candidates=len(candidates),
        at_once=record.at_once if record else None,
        halving=settings.halving,
        steps=settings.steps or None,
        swept=swept,
        base_eval_loss=_finite(record.base_eval_loss) if record else None,
        best=f"{name}/{outcome.best}" if outcome else None,
        train_s=_train_s(timings, record),
        peak_memory_bytes=max((row.peak_memory_bytes for row in timings), default=None),
        tried=cells,
        sweet_spot=find_sweet_spot(cells, runs),
        command=sweep_command(run_record, folder.name, full_rate),
    )
    return summary, runs


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _train_s(timings: Sequence[WaveTiming], record: SweepRecord | None) -> float | None:
    """Return the seconds of all steps; None if some were not timed, as steps before a kill.

    Of waves that several processes trained side by side the slowest counts.
    """
    timed = sum(row.timed_steps for row in timings)
    if not timings or record is None or timed != record.steps_taken:
        return None
    slowest: dict[int, float] = {}
    for row in timings:  # those of one round were recorded at the same step
        slowest[row.step] = max(row.train_s, slowest.get(row.step, 0.0))
    return sum(slowest.values())


def _sort_key(run: RunSummary) -> tuple[int, float]:
    """Return the sort key: unfinished candidates by loss, the others in their order."""
    if run.status == "unfinished":
        return 1, math.inf if run.eval_loss is None else run.eval_loss
    return {"finished": 0}.get(run.status, 2), 0.0


def _candidate(
    folder: Path,
    base: Path,
    group: str,
    state: CandidateState,
    swept: tuple[str, ...],
    faults: Faults,
) -> RunSummary:
    own = folder / CANDIDATES / state.name
    run = read_run(own, base, faults, group=group)
    return replace(
        run,
        label=candidate_label(run, state, swept),
        status=_STATUSES.get(state.status, "unfinished"),
        reason=state.reason,
        steps=max(state.step, run.steps or 0),  # sweep.json is written after whole waves only
        saved_step=state.saved_step,
        saved_eval_loss=_finite(state.saved_eval_loss),
    )


def candidate_label(run: RunSummary, state: CandidateState, swept: tuple[str, ...]) -> str:
    """Return the values that vary, in a few characters: r4 3e-4."""
    words = []
    for key in swept:
        value = state.settings.get(key)
        shown = short_number(value) if isinstance(value, float) else str(value)
        words.append(f"{_SHORT.get(key, '')}{shown}")
    return " ".join(words) or run.label


def find_grid_cells(runs: Sequence[RunSummary]) -> tuple[GridCell, ...]:
    """Return the loss of each rank and learning rate: the mean over seeds, the best over the rest.

    Only finished candidates count: one that was stopped has taken fewer steps.
    """
    best: dict[tuple[int, float], GridCell] = {}
    for key, losses in _by_setting(runs).items():
        cell = GridCell(key[0], key[1], statistics.fmean(losses), len(losses))
        known = best.get(key[:2])
        if known is None or cell.loss < known.loss:
            best[key[:2]] = cell
    return tuple(best[key] for key in sorted(best))


Key = tuple[int, float, str]


def _by_setting(runs: Sequence[RunSummary]) -> dict[Key, list[float]]:
    """Return the losses of what was saved, grouped by all settings but the seed."""
    found: dict[Key, list[float]] = defaultdict(list)
    for run in runs:
        if run.status != "finished" or run.result_loss is None:
            continue
        if run.rank is None or run.learning_rate is None:  # full fine-tuning
            continue
        rest = {k: v for k, v in run.settings.items() if k not in ("train.seed", "lora.init_seed")}
        found[(run.rank, run.learning_rate, repr(sorted(rest.items(), key=str)))].append(
            run.result_loss
        )
    return found


def find_sweet_spot(cells: Sequence[GridCell], runs: Sequence[RunSummary]) -> SweetSpot | None:
    """Return the smallest rank whose loss is within noise of the best; None for one rank."""
    by_rank: dict[int, GridCell] = {}
    for one in cells:
        known = by_rank.get(one.rank)
        if known is None or one.loss < known.loss:
            by_rank[one.rank] = one
    if len(by_rank) < 2:
        return None
    best = min(by_rank.values(), key=lambda one: (one.loss, one.rank))
    noise, noise_from = _noise(runs, best.loss)
    rank_enough = min(r for r, one in by_rank.items() if one.loss <= best.loss + noise)
    loss = by_rank[rank_enough].loss
    return SweetSpot(rank_enough, loss, best.rank, best.loss, noise, noise_from)


def _noise(runs: Sequence[RunSummary], best_loss: float) -> tuple[float, str]:
    """Return the noise of a loss in nats, and how it was estimated, in words.

    With several seeds it is their standard deviation, pooled over the best setting of each rank.
    """
    best: dict[int, list[float]] = {}
    for (one_rank, _, _), losses in _by_setting(runs).items():
        known = best.get(one_rank)
        if known is None or statistics.fmean(losses) < statistics.fmean(known):
            best[one_rank] = losses
    several = [losses for losses in best.values() if len(losses) > 1]
    if not several:
        percent = f"{100 * NOISE_FRACTION:g} % of the best loss"
        return (
            NOISE_FRACTION * abs(best_loss),
            f"{percent}: with one seed, noise cannot be measured",
        )
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in several)
    degrees = sum(len(losses) - 1 for losses in several)
    n_seeds = max(len(losses) for losses in several)
    return math.sqrt(squares / degrees), f"one standard deviation between {n_seeds} seeds"
