"""Draws figures with matplotlib that work in a light page, a dark page and a PNG.

Colours are Okabe and Ito's, distinct for people with any colour vision, and each line has its own
style and name. The figures are small enough to be read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lora.report.curves import COLOURS, LINE_STYLES, smooth
from lora.report.numbers import loss_text, short
from lora.report.records.records import GridCell, Memory, SweetSpot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = tuple(colour.lower() for colour in COLOURS)
INK, MUTED, RULE, BAND, PAPER = "#1c1d1f", "#5d6066", "#d4d6da", "#eceef1", "#fdfdfc"
"""Colours of text, secondary text, grid, areas and background; the dark page replaces each."""
WIDTH_IN, HEIGHT_IN, DPI = 4.8, 3.0, 160
FONT_PT = 9.0
_CHARACTER_PT = 4.8
_MAX_CHARACTERS = 18
_LABEL_GAP = 0.062
"""Between two names at the ends of lines, as a fraction of the axes' height."""
_CLIP = 1.6
"""Losses above this many times the highest initial validation loss are cut off."""

_LOG_FROM = 5
"""The loss axis is logarithmic if the highest loss is more than this many times the lowest."""
_LOG_TICKS = [digit * 10.0**power for power in range(-6, 4) for digit in (1, 2, 5)]

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A line: its label and (x, y) points."""

    label: str
    points: Points
    number: int | None = 0
    """Index of its colour and style; None is pale."""
    training: Points = field(default=())


def draw_curves(
    named: Sequence[Curve], pale: Sequence[Curve], x_label: str, *, has_names: bool = True
) -> Figure:
    """Draw validation loss of `named` with names at the line ends, and of `pale` without.

    Without `has_names` a line is labelled with its loss alone, which is enough for a single run.
    """
    labels = [_line_label(curve, has_name=has_names) for curve in named]
    low, high = _limits(named, pale)
    is_log = low > 0 and high > _LOG_FROM * low
    y_label = "validation loss, nats per token" + (", logarithmic" if is_log else "")
    canvas = Canvas(labels, y_label, x_label)
    axes = canvas.axes
    for curve in pale:
        _plot(axes, curve.points, color=RULE, linewidth=0.8, zorder=1)
    for curve in named:
        if curve.training:
            xs = [x for x, _ in curve.training]
            losses = smooth([y for _, y in curve.training])
            axes.plot(xs, losses, color=_colour(curve), alpha=0.3, linewidth=0.9, zorder=2)
    for curve in named:
        style = LINE_STYLES[(curve.number or 0) % len(LINE_STYLES)]
        _plot(axes, curve.points, color=_colour(curve), linestyle=style, marker="o", markersize=2.6,
              linewidth=1.5, zorder=3)  # fmt: skip
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)
    low, high = (0.9 * low, 1.1 * high) if is_log else (low, high)
    _set_losses(axes, low, high, is_log=is_log)
    canvas.label_ends(labels, named)
    return canvas.figure


def draw_ranks(tried: Sequence[GridCell], spot: SweetSpot) -> Figure:
    """Draw the best loss of each rank, other learning rates as dots, a ring at what is enough."""
    canvas = Canvas([], "validation loss at the end, nats per token", "rank")
    axes = canvas.axes
    ranks = sorted({one.rank for one in tried})
    x_of = {rank: n for n, rank in enumerate(ranks)}
    best = [min(one.loss for one in tried if one.rank == rank) for rank in ranks]
    low, high = min(best), max(max(best), spot.best_loss + spot.noise)
    room = max(high - low, 1e-3)
    top = high + 0.5 * room
    axes.axhspan(spot.best_loss, spot.best_loss + spot.noise, color=BAND, linewidth=0, zorder=0)
    for one in tried:
        if one.loss <= top:
            axes.plot([x_of[one.rank]], [one.loss], color=MUTED, marker="o", markersize=3.2,
                      alpha=0.55, zorder=2, clip_on=False)  # fmt: skip
    axes.plot(range(len(ranks)), best, color=SERIES[0], marker="o", markersize=4.5, zorder=3)
    where = x_of[spot.rank], spot.loss
    axes.plot(*where, marker="o", markersize=11, color=SERIES[1], fillstyle="none",
              markeredgewidth=1.6, zorder=4)  # fmt: skip
    is_last = spot.rank == ranks[-1]
    verdict = "is best" if spot.rank == spot.best_rank else "is enough"
    axes.annotate(
        f"rank {spot.rank} {verdict}", where, (8 if is_last else 0, -13), color=INK, va="top",
        textcoords="offset points", fontsize=FONT_PT, ha="right" if is_last else "center",
    )  # fmt: skip
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlim(-0.4, len(ranks) - 0.6)
    axes.set_ylim(low - 0.4 * room, top)
    return canvas.figure


def draw_rates(lines: Sequence[Curve], base_loss: float | None) -> Figure:
    """Draw loss against learning rate; losses above the base's are cut off."""
    labels = [_cut(line.label) for line in lines]
    losses = [loss for line in lines for _, loss in line.points]
    low, high = min(losses), max(losses)
    if base_loss is not None and base_loss > low:
        high = min(high, base_loss)
    is_log = low > 0 and high > _LOG_FROM * low
    y_label = "validation loss at the end, nats per token" + (", logarithmic" if is_log else "")
    canvas = Canvas(labels, y_label, "learning rate")
    axes = canvas.axes
    room = max(high - low, 1e-3)
    top = 1.15 * high if is_log else high + 0.08 * room
    _set_losses(axes, 0.8 * low if is_log else low - 0.1 * room, top, is_log=is_log)
    axes.set_xscale("log")
    for line in lines:
        style = LINE_STYLES[(line.number or 0) % len(LINE_STYLES)]
        _plot(axes, [(rate, min(loss, top)) for rate, loss in line.points], color=_colour(line),
              linestyle=style, marker="o", markersize=3.6)  # fmt: skip
        cut = [(rate, top) for rate, loss in line.points if loss > top]
        _plot(axes, cut, color=_colour(line), linestyle="none", marker="^", markersize=6,
              clip_on=False, zorder=5)  # fmt: skip
        best = min(line.points, key=lambda point: point[1])
        axes.plot(*best, marker="o", markersize=10, color=_colour(line), fillstyle="none",
                  markeredgewidth=1.4)  # fmt: skip
    rates = sorted({rate for line in lines for rate, _ in line.points})
    shown = rates if len(rates) <= 5 else rates[:: math.ceil(len(rates) / 5)]
    axes.set_xticks(shown, [short(rate) for rate in shown])
    axes.minorticks_off()
    # Label the last point that is inside: at the top edge all lines would meet.
    inside = [[point for point in line.points if point[1] <= top] for line in lines]
    ends = [
        replace(line, points=own or line.points) for line, own in zip(lines, inside, strict=True)
    ]
    canvas.label_ends(labels, ends)
    return canvas.figure


def draw_lines(
    lines: Sequence[Curve], y_label: str, x_label: str, *, has_names: bool = True
) -> Figure:
    """Draw lines of any quantity from zero up, labelled at their ends if there are several."""
    labels = [_cut(line.label) if has_names else "" for line in lines]
    high = max(y for line in lines for _, y in line.points)
    canvas = Canvas(labels if has_names else [], y_label, x_label)
    for line in lines:
        style = LINE_STYLES[(line.number or 0) % len(LINE_STYLES)]
        _plot(canvas.axes, line.points, color=_colour(line), linestyle=style, linewidth=1.4)
    canvas.axes.set_xlim(left=0)
    canvas.axes.locator_params(axis="x", integer=True)
    canvas.axes.set_ylim(0, 1.1 * high or 1.0)
    canvas.axes.yaxis.set_major_formatter(lambda value, _: short(value))
    if has_names:
        canvas.label_ends(labels, lines)
    return canvas.figure


def draw_bars(bars: Sequence[tuple[str, Memory]]) -> Figure:
    """Draw planned memory by part as stacked bars, and measured memory as a mark."""
    height = 0.85 + 0.42 * len(bars)
    names = [_cut(name) for name, _ in bars]
    canvas = Canvas([], "", "GB", height_in=height, left_labels=names)
    axes = canvas.axes
    for y, (_, memory) in enumerate(bars):
        left = 0.0
        for number, size in enumerate(memory.planned.values()):
            axes.barh(y, size / 1e9, 0.56, left / 1e9, color=SERIES[number % len(SERIES)],
                      edgecolor=PAPER, linewidth=0.8)  # fmt: skip
            left += size
        if memory.measured is not None:
            at = memory.measured / 1e9
            axes.plot([at, at], [y - 0.4, y + 0.4], color=INK, linewidth=2, zorder=5)
    axes.set_yticks(range(len(bars)), names, parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=RULE, linewidth=0.6)
    axes.set_xlim(left=0)
    return canvas.figure


class Canvas:
    """A figure with one pair of axes, in the page's colours."""

    def __init__(
        self,
        labels: Sequence[str],
        y_label: str,
        x_label: str,
        *,
        height_in: float = HEIGHT_IN,
        left_labels: Sequence[str] = (),
    ) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI)
        width_pt, height_pt = WIDTH_IN * 72, height_in * 72
        left = 36.0 if not left_labels else 12 + _CHARACTER_PT * max(map(len, left_labels))
        right = 14 + (6 + _CHARACTER_PT * max(map(len, labels)) if labels else 0)
        bottom, top = 34.0, 22.0 if y_label else 6.0
        self.axes = self.figure.add_axes(
            (left / width_pt, bottom / height_pt,
             (width_pt - left - right) / width_pt, (height_pt - bottom - top) / height_pt)
        )  # fmt: skip
        axes = self.axes
        axes.set_facecolor("none")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.tick_params(colors=MUTED, labelsize=FONT_PT, length=0, pad=5)
        axes.grid(visible=True, axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label, color=MUTED, fontsize=FONT_PT, labelpad=4)
        if y_label:
            where = (-left + 8) / (width_pt - left - right), 1.0
            axes.annotate(y_label, where, (0, 10), xycoords="axes fraction", color=MUTED,
                          textcoords="offset points", fontsize=FONT_PT)  # fmt: skip

    def label_ends(self, labels: Sequence[str], curves: Sequence[Curve]) -> None:
        """Label the end of each line, without overlap between labels."""
        to_display, to_axes = self.axes.transData, self.axes.transAxes.inverted()
        ends = [(n, curve) for n, curve in enumerate(curves) if curve.points]
        positions = [to_axes.transform(to_display.transform(c.points[-1])) for _, c in ends]
        wanted = [(float(x), min(1.0, max(0.0, float(y)))) for x, y in positions]
        apart = spread([y for _, y in wanted], _LABEL_GAP)
        for (n, curve), at, end in zip(ends, apart, wanted, strict=True):
            self.axes.annotate(
                labels[n], end, (1.03, at), xycoords="axes fraction", textcoords="axes fraction",
                va="center", fontsize=FONT_PT, color=INK, parse_math=False, annotation_clip=False,
                arrowprops={"arrowstyle": "-", "linestyle": ":", "color": _colour(curve),
                            "relpos": (0, 0.5),  # from the text's left edge: no line crosses a name
                            "linewidth": 0.9, "shrinkA": 1, "shrinkB": 2, "alpha": 0.8},
            )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return positions in 0 … 1 near the wanted ones, at least `gap` apart where there is room."""
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    gap = min(gap, 1.0 / max(1, len(wanted) - 1))
    placed: list[float] = []
    for n in order:
        placed.append(max(wanted[n], placed[-1] + gap) if placed else max(0.0, wanted[n]))
    ceiling = 1.0
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    found = [0.0] * len(wanted)
    for n, at in zip(order, placed, strict=True):
        found[n] = at
    return found


def _set_losses(axes: Axes, low: float, high: float, *, is_log: bool) -> None:
    """Set the loss axis to `low` … `high`."""
    axes.set_ylim(low, high)  # before the scale, which would be chosen from diverged losses too
    if is_log:
        axes.set_yscale("log")
        shown = [tick for tick in _LOG_TICKS if low <= tick <= high]
        axes.set_yticks(shown, [short(tick) for tick in shown])
        axes.minorticks_off()


def _limits(named: Sequence[Curve], pale: Sequence[Curve]) -> tuple[float, float]:
    """Return the range of the loss axis; diverged losses are cut off."""
    curves = [curve for curve in (*named, *pale) if curve.points]
    losses = [loss for curve in curves for _, loss in curve.points]
    losses += [loss for curve in named for _, loss in curve.training[len(curve.training) // 4 :]]
    start = max(curve.points[0][1] for curve in curves)
    low, high = min(losses), min(max(losses), _CLIP * start)
    room = max(high - low, 1e-3)
    if low > 0 and high > _LOG_FROM * low:
        return low, high
    return low - 0.06 * room, high + 0.04 * room


def _line_label(curve: Curve, *, has_name: bool) -> str:
    end = loss_text(curve.points[-1][1], 3) if curve.points else ""
    return f"{_cut(curve.label)} {end}" if has_name else end


def _cut(name: str) -> str:
    """Return a name shortened in the middle to what fits a picture."""
    plain = "".join(c if c.isprintable() else "�" for c in name)
    if len(plain) <= _MAX_CHARACTERS:
        return plain
    half = _MAX_CHARACTERS // 2
    return f"{plain[: half - 1]}…{plain[-half:]}"


def _plot(axes: Axes, points: Points, **looks: Any) -> None:
    if points:
        axes.plot([x for x, _ in points], [y for _, y in points], **looks)


def _colour(curve: Curve) -> str:
    return RULE if curve.number is None else SERIES[curve.number % len(SERIES)]
