"""The pictures of how a run was steered: learning rate and gradient norm against steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lora.report.canvas import Curve, draw_lines
from lora.report.curves import smooth
from lora.report.figures import Picture, choose_curves
from lora.report.numbers import short
from lora.report.records.records import Report, RunSummary, StepState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 400
"""Of a line: more cannot be told apart at the pictures' width, and make the page large."""

Value = Callable[[StepState], float | None]


def course_pictures(report: Report) -> list[Picture]:
    """Return learning rate and gradient norm of the runs that the loss picture names.

    Steps without the value, and norms that are not finite, are left out.
    """
    runs = choose_curves(report.runs)[0]
    rates = [_thinned(line) for line in _lines(runs, lambda state: state.learning_rate)]
    # Smoothed before points are left out, or a rise between two of them would not be seen.
    norms = [_thinned(_smoothed(line)) for line in _lines(runs, lambda state: state.gradient_norm)]
    found = []
    if rates:
        peaks = "; ".join(f"{line.label} peaks at {short(_highest(line))}" for line in rates)
        found.append(
            Picture(
                "learning_rate",
                "Learning rate of each step: the warm-up, then the schedule.",
                f"Learning rate against optimizer steps: {peaks}.",
                _drawing(rates, "learning rate", has_names=len(report.runs) > 1),
            )
        )
    if norms:
        ends = "; ".join(f"{line.label} ends at {short(line.points[-1][1])}" for line in norms)
        found.append(
            Picture(
                "gradient_norm",
                "Gradient norm before clipping, smoothed. A sudden rise comes before divergence: "
                "lower the learning rate or warm up longer.",
                f"Gradient norm against optimizer steps: {ends}.",
                _drawing(norms, "gradient norm before clipping", has_names=len(report.runs) > 1),
            )
        )
    return found


def _drawing(lines: list[Curve], y_label: str, *, has_names: bool) -> Callable[[], Figure]:
    return lambda: draw_lines(lines, y_label, "optimizer steps", has_names=has_names)


def _lines(runs: Sequence[RunSummary], value: Value) -> list[Curve]:
    """Return a line for each run with at least two values."""
    found = []
    for number, run in enumerate(runs):
        points = [
            (float(state.step), at)
            for state in run.course
            if (at := value(state)) is not None and math.isfinite(at)
        ]
        if len(points) > 1:
            found.append(Curve(run.label, points, number))
    return found


def _thinned(line: Curve) -> Curve:
    stride = math.ceil(len(line.points) / MAX_POINTS)
    last = line.points[-1:] if (len(line.points) - 1) % stride else []
    return Curve(line.label, [*line.points[::stride], *last], line.number)


def _smoothed(line: Curve) -> Curve:
    values = smooth([y for _, y in line.points])
    xs = [x for x, _ in line.points]
    return Curve(line.label, list(zip(xs, values, strict=True)), line.number)


def _highest(line: Curve) -> float:
    return max(y for _, y in line.points)
