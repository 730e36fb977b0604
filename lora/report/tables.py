"""Tables of a report, for page and terminal: text cells; columns without any value are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora.report import numbers
from lora.report.numbers import DASH
from lora.report.records.records import (
    ComparisonSummary,
    Method,
    Report,
    RunSummary,
)
from lora.runs.comparison_record import Ratios

SINGLE = "single runs"
"""Heading of the runs outside of sweeps and comparisons, where there are both."""
PART_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "loss",
    "other": "process and library",
}
_METHOD_CELLS: dict[Method, str] = {"lora": "LoRA", "full": "full", "peft": "PEFT", "unknown": DASH}
_CHOSEN = {"sweep": "best tried", "default": "default", "given": "given"}


@dataclass(frozen=True)
class Column:
    """A column's heading."""

    title: str
    unit: str = ""
    is_numeric: bool = True


@dataclass(frozen=True)
class Row:
    """A row: its name, its cells, and the group it belongs to."""

    name: str
    cells: tuple[str, ...]
    key: int | None = None
    """Index of its colour in the pictures."""
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column, the rows' names, has its heading in `corner`."""

    corner: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


Cell = tuple[Column, Callable[[RunSummary], str]]

_RUN_CELLS: tuple[Cell, ...] = (
    (Column("method", is_numeric=False), lambda r: _METHOD_CELLS[r.method]),
    (Column("rank"), lambda r: numbers.count_text(r.rank)),
    (Column("alpha"), lambda r: numbers.short(r.alpha)),
    (Column("learning rate"), lambda r: numbers.short(r.learning_rate)),
    (Column("seed"), lambda r: DASH if r.seed is None else str(r.seed)),
    (Column("steps"), lambda r: _steps(r)),
    (Column("validation", "best loss"), lambda r: numbers.loss_text(r.best_eval_loss)),
    (Column("validation", "final loss"), lambda r: numbers.loss_text(r.eval_loss)),
    (Column("saved", "step"), lambda r: numbers.count_text(r.saved_step)),
    (Column("step", "ms"), lambda r: numbers.figures(_times(r.step_s, 1000))),
    (Column("speed", "tokens/s"), lambda r: numbers.figures(r.tokens_per_s)),
    (Column("peak", "GB"), lambda r: numbers.figures(_times(r.peak_memory_bytes, 1e-9))),
    (Column("trainable", "parameters"), lambda r: numbers.parameters_text(r.trainable_parameters)),
    (Column("trainable", "share"), lambda r: numbers.share_text(r.trainable_share)),
    (Column("stored", "on disk"), lambda r: numbers.size_text(r.stored_bytes)),
)


def runs_table(report: Report, keys: dict[str, int] | None = None) -> Table:
    """Return a table with a row per run; `keys` has the colours of those in the pictures."""
    runs = report.runs
    same_seed = len({run.seed for run in runs}) == 1
    cells = [cell for cell in _RUN_CELLS if not (cell[0].title == "seed" and same_seed)]
    columns, rows = _filled(cells, runs)
    groups = {run.group for run in runs}
    table_rows = tuple(
        Row(
            run.name.removeprefix(f"{run.group}/") if run.group else run.name,
            row,
            (keys or {}).get(run.name),
            (run.group or SINGLE) if len(groups) > 1 else "",
        )
        for run, row in zip(runs, rows, strict=True)
    )
    return Table("run", columns, table_rows)


def ratios_table(report: Report) -> Table:
    """Return the ratios of each LoRA run to the runs it is compared with."""
    columns = (
        Column("speed", "per step"),
        Column("speed", "all steps"),
        Column("peak memory", "saved"),
        Column("trainable", "of the other's"),
        Column("stored", "of the other's"),
        Column("validation loss", "difference, nats"),
    )
    rows = tuple(Row(_against(report, one), _ratio_cells(one)) for one in report.ratios)
    return Table("LoRA vs.", columns, rows)


def members_table(report: Report, comparison: ComparisonSummary) -> Table:
    """Return learning rate, forgetting and task score of a comparison's members."""
    cells: list[tuple[Column, list[str]]] = []
    members = comparison.members
    runs = [report.run(member.run) for member in members]
    chosen = [_CHOSEN.get(member.rate_chosen, DASH) for member in members]
    cells.append((Column("learning rate"), [numbers.short(run.learning_rate) for run in runs]))
    cells.append((Column("chosen", is_numeric=False), chosen))
    for title, changes, shown in (
        ("loss on another text", [m.forgetting for m in members], numbers.loss_text),
        ("", [m.task for m in members], numbers.share_text),
    ):
        named = next((change.name for change in changes if change is not None), None)
        if named is not None:
            heading = title or named
            before = [DASH if c is None else shown(c.before) for c in changes]
            after = [DASH if c is None else shown(c.after) for c in changes]
            cells += [(Column(heading, "before"), before), (Column(heading, "after"), after)]
    rows = tuple(
        Row(run.label, tuple(column[1][n] for column in cells)) for n, run in enumerate(runs)
    )
    return Table("member", tuple(column for column, _ in cells), rows)


def memory_table(report: Report, most: int) -> Table | None:
    """Return planned memory by part, its sum, and measured memory; a column per run."""
    runs = [run for run in report.runs if run.memory is not None][:most]
    known = [(run, run.memory) for run in runs if run.memory is not None]
    if not known:
        return None
    rows = []
    for number, part in enumerate(known[0][1].planned):
        cells = tuple(_gigabytes(memory.planned.get(part)) for _, memory in known)
        rows.append(Row(PART_NAMES.get(part, part), cells, number))
    rows.append(Row("planned", tuple(_gigabytes(memory.planned_total) for _, memory in known)))
    rows.append(Row("measured", tuple(_gigabytes(memory.measured) for _, memory in known)))
    rows.append(Row("planning error", tuple(_error(m.planned_total, m.measured) for _, m in known)))
    columns = tuple(Column(run.label, "GB") for run, _ in known)
    return Table("part", columns, tuple(rows))


def dropped_table(runs: Sequence[RunSummary]) -> Table | None:
    """Return the candidates that were stopped or failed, with the reason."""
    dropped = [run for run in runs if run.status in ("stopped", "failed")]
    if not dropped:
        return None
    columns = (
        Column("ended", is_numeric=False),
        Column("at step"),
        Column("validation loss", "newest"),
        Column("reason", is_numeric=False),
    )
    rows = tuple(
        Row(
            run.name.removeprefix(f"{run.group}/"),
            (run.status, numbers.count_text(run.steps), numbers.loss_text(run.eval_loss),
             run.reason or DASH),
        )
        for run in dropped
    )  # fmt: skip
    return Table("candidate", columns, rows)


def differing_table(report: Report, most: int) -> Table | None:
    """Return the settings that differ between runs: a column per run or, for many, the values."""
    by_run = [run.settings for run in report.runs]
    names = [
        name
        for name in dict.fromkeys(key for settings in by_run for key in settings)
        if len({repr(settings[name]) for settings in by_run if name in settings}) > 1
    ]
    if not names:
        return None
    if len(report.runs) > most:
        rows = tuple(Row(name, (distinct(s.get(name) for s in by_run),)) for name in names)
        return Table("setting", (Column("values", is_numeric=False),), rows)
    columns = tuple(Column(run.label, is_numeric=False) for run in report.runs)
    cells = [tuple(value_text(s.get(name)) for s in by_run) for name in names]
    return Table("setting", columns, tuple(Row(n, c) for n, c in zip(names, cells, strict=True)))


def facts_table(corner: str, facts: Sequence[dict[str, Any]]) -> Table | None:
    """Return a table of names and their distinct values over all runs."""
    names = dict.fromkeys(key for own in facts for key in own)
    rows = tuple(Row(name, (distinct(own.get(name) for own in facts),)) for name in names)
    return Table(corner, (Column("value", is_numeric=False),), rows) if rows else None


def distinct(values: Any) -> str:
    """Return the known values as text, each once, in order of appearance."""
    shown = dict.fromkeys(value_text(value) for value in values)
    known = [text for text in shown if text != DASH]
    return " · ".join(known) if known else DASH


def value_text(value: Any) -> str:
    """Return a setting as text."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return numbers.short(value)
    if isinstance(value, list):
        return ", ".join(value_text(item) for item in value) or "none"
    return "none" if value in ("", {}) else str(value)


def describe_ratios(report: Report, one: Ratios) -> str:
    """Return a sentence that compares LoRA with another run; "" if nothing is known."""
    parts = []
    if one.step_speed is not None:
        parts.append(f"{one.step_speed:.2f} times the speed per step")
    if one.memory_saved is not None:
        percent = round(100 * abs(one.memory_saved))
        side = "less" if one.memory_saved > 0 else "more"
        parts.append(f"{percent} % {side} peak memory" if percent else "the same peak memory")
    if one.loss_difference is not None:
        side = "lower" if one.loss_difference < 0 else "higher"
        parts.append(f"validation loss {abs(one.loss_difference):.4f} {side}")
    return f"{_against(report, one)}: {', '.join(parts)}." if parts else ""


def _against(report: Report, one: Ratios) -> str:
    run, other = report.run(one.run), report.run(one.against)
    return f"{run.label} vs. {other.label}"


def _ratio_cells(one: Ratios) -> tuple[str, ...]:
    return (
        numbers.times_text(one.step_speed),
        numbers.times_text(one.total_speed),
        numbers.share_text(one.memory_saved).replace("-", "−"),
        numbers.share_text(one.trainable_fraction),
        numbers.share_text(one.stored_fraction),
        numbers.signed_loss(one.loss_difference),
    )


def _filled(
    cells: Sequence[Cell], runs: Sequence[RunSummary]
) -> tuple[tuple[Column, ...], list[tuple[str, ...]]]:
    """Return the columns in which at least one run has a value, and the runs' cells in them."""
    found = [(column, [shown(run) for run in runs]) for column, shown in cells]
    kept = [(column, texts) for column, texts in found if any(text != DASH for text in texts)]
    rows = [tuple(texts[n] for _, texts in kept) for n in range(len(runs))]
    return tuple(column for column, _ in kept), rows


def _steps(run: RunSummary) -> str:
    taken, asked = numbers.count_text(run.steps), numbers.count_text(run.total_steps)
    is_whole = run.steps == run.total_steps or run.total_steps is None
    return taken if is_whole else f"{taken} of {asked}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _gigabytes(n_bytes: int | None) -> str:
    return DASH if n_bytes is None else f"{n_bytes / 1e9:.3f}"


def _error(planned: int, measured: int | None) -> str:
    return DASH if not measured else f"{100 * (planned / measured - 1):+.1f} %".replace("-", "−")
