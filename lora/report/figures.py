"""The pictures of a report, each with its caption and alternative text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora.report.canvas import (
    LINE_STYLES,
    SERIES,
    Canvas,
    Curve,
    draw_bars,
    draw_curves,
    draw_ranks,
    draw_rates,
)
from lora.report.numbers import loss_text, short, size_text
from lora.report.records.records import (
    ComparisonSummary,
    Report,
    RunSummary,
    SweepSummary,
    method_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CURVES = len(SERIES)
MAX_PALE = 60
"""Further runs, pale and unnamed."""
MAX_BARS = 8
MINUTE_S, HOUR_S = 60.0, 3600.0


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    name: str
    """Of its file; unique in the report."""
    caption: str
    alt: str
    """Alternative text."""
    draw: Callable[[], Figure]


def loss_pictures(report: Report) -> list[Picture]:
    """Return validation loss against steps, and against time where it is known."""
    named, pale = choose_curves(report.runs)
    if not named and not pale:
        return []
    shown = [_curve(run, number, by_time=False) for number, run in enumerate(named)]
    faint = [_curve(run, None, by_time=False) for run in pale[:MAX_PALE]]
    ends = "; ".join(f"{run.name} ends at {loss_text(run.eval_loss)}" for run in named)
    left_out = f" The best {len(named)} runs are named, the others grey." if pale else ""
    legend = f"Dots are evaluations, pale lines the training loss.{left_out}"
    shared = ""
    if report.sweeps:
        shared = " Candidates of a sweep train together and have no times of their own."
    has_names = len(report.runs) > 1
    pictures = [
        Picture(
            "loss_by_steps",
            f"Validation loss against steps. {legend}",
            f"Validation loss against optimizer steps: {ends}.",
            lambda: draw_curves(shown, faint, "optimizer steps", has_names=has_names),
        )
    ]
    timed = [run for run in named if run.held_out[-1].time_s is not None]
    if timed:
        seconds = max(run.held_out[-1].time_s or 0.0 for run in timed)
        unit, divisor = time_unit(seconds)
        by_time = [
            _curve(run, number, by_time=True, divisor=divisor)
            for number, run in enumerate(named)
            if run in timed
        ]
        lasted = "; ".join(
            f"{run.name} takes {short(run.held_out[-1].time_s or 0.0, 3)} s" for run in timed
        )
        pictures.append(
            Picture(
                "loss_by_time",
                f"Validation loss against {unit} of training steps; evaluations and saves left out."
                f"{shared}",
                f"Validation loss against training time: {lasted}.",
                lambda: draw_curves(by_time, [], f"{unit} of training steps", has_names=has_names),
            )
        )
    return pictures


def choose_curves(runs: Sequence[RunSummary]) -> tuple[list[RunSummary], list[RunSummary]]:
    """Return the runs to name in a picture, and those to draw pale.

    Single runs come first, then members, then candidates (which have no times of their
    own) by their loss at the end.
    """
    measured = [run for run in runs if run.held_out]
    if len(measured) <= MAX_CURVES:
        return measured, []
    alone = [run for run in measured if not run.group]
    grouped = sorted((run for run in measured if run.group), key=_curve_order)
    ranked = [*alone, *grouped]
    return ranked[:MAX_CURVES], ranked[MAX_CURVES:]


def _curve_order(run: RunSummary) -> tuple[bool, bool, bool, float]:
    loss = math.inf if run.result_loss is None else run.result_loss
    return run.step_s is None, run.status == "failed", run.status == "stopped", loss


def sweep_pictures(sweep: SweepSummary, number: int) -> list[Picture]:
    """Return loss against rank and against learning rate, where several were tried."""
    pictures = []
    ranks = sorted({tried.rank for tried in sweep.tried})
    suffix = "" if number == 1 else f"_{number}"
    spot = sweep.sweet_spot
    if spot is not None:
        pictures.append(
            Picture(
                f"rank{suffix}",
                "Best validation loss by rank. The band is the noise level: "
                f"{spot.noise_from}. Small dots are other learning rates "
                "(much worse ones are left out).",
                f"Validation loss by rank: the best is rank {spot.best_rank} with "
                f"{loss_text(spot.best_loss)}; rank {spot.rank} with {loss_text(spot.loss)} is the "
                "smallest within noise of it.",
                lambda: draw_ranks(sweep.tried, spot),
            )
        )
    if len({tried.learning_rate for tried in sweep.tried}) > 1:
        lines = []
        for number_of_rank, rank in enumerate(ranks):
            points = [(t.learning_rate, t.loss) for t in sweep.tried if t.rank == rank]
            lines.append(Curve(f"rank {rank}", points, number_of_rank))
        pictures.append(_rate_picture(f"rate{suffix}", lines[-MAX_CURVES:], sweep.base_eval_loss))
    return pictures


def comparison_pictures(
    report: Report, comparison: ComparisonSummary, number: int
) -> list[Picture]:
    """Return loss against learning rate of each member with rate trials."""
    lines: list[Curve] = []
    for member in comparison.members:
        points = [
            (tried.learning_rate, tried.eval_loss)
            for tried in member.rates_tried
            if tried.eval_loss is not None
        ]
        method = report.run(member.run).method
        if len(points) > 1 and method != "peft":  # PEFT's member has LoRA's rate
            lines.append(Curve(method_name(method), points, len(lines)))
    if not lines:
        return []
    suffix = "" if number == 1 else f"_{number}"
    return [_rate_picture(f"rates_tried{suffix}", lines, comparison.base_eval_loss)]


def memory_picture(report: Report) -> Picture | None:
    """Return bars of planned memory by part, with a mark at the measured peak."""
    runs = [run for run in report.runs if run.memory is not None][:MAX_BARS]
    if not runs:
        return None
    bars = [(run.label, run.memory) for run in runs if run.memory is not None]
    sizes = "; ".join(
        f"{run.name}: {size_text(run.memory.planned_total)} planned, "
        f"{size_text(run.memory.measured)} measured"
        for run in runs
        if run.memory is not None
    )
    return Picture(
        "memory",
        "Memory by part, planned before the weights were loaded; the dark line is the measured "
        "peak.",
        f"Memory: {sizes}.",
        lambda: draw_bars(bars),
    )


def time_unit(seconds: float) -> tuple[str, float]:
    """Return a fitting unit for a span of time, and its seconds."""
    if seconds > 3 * HOUR_S:
        return "hours", HOUR_S
    return ("minutes", MINUTE_S) if seconds > 5 * MINUTE_S else ("seconds", 1.0)


def _rate_picture(name: str, lines: list[Curve], base_loss: float | None) -> Picture:
    best = [min(line.points, key=lambda point: point[1]) for line in lines if line.points]
    best_rates = "; ".join(
        f"{line.label} is best at {short(rate)} with {loss_text(loss)}"
        for line, (rate, loss) in zip(lines, best, strict=True)
    )
    return Picture(
        name,
        "Validation loss at the end, by learning rate. Rings mark the best; triangles at the top "
        "edge are above the loss before training.",
        f"Validation loss by learning rate: {best_rates}.",
        lambda: draw_rates(lines, base_loss),
    )


def _curve(run: RunSummary, number: int | None, *, by_time: bool, divisor: float = 1.0) -> Curve:
    def points(given: Sequence[object]) -> list[tuple[float, float]]:
        found = []
        for point in given:
            at = point.time_s if by_time else point.step  # type: ignore[attr-defined]
            loss = point.loss  # type: ignore[attr-defined]
            if at is not None and math.isfinite(loss):
                found.append((at / divisor, loss))
        return found

    return Curve(run.label, points(run.held_out), number, points(run.training))


__all__ = ["LINE_STYLES", "Canvas", "Picture"]
