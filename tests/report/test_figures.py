from __future__ import annotations

import itertools
import math

import pytest
from matplotlib.text import Annotation, Text

from lora.report.canvas import Curve, draw_bars, draw_curves, draw_ranks, draw_rates, spread
from lora.report.figures import choose_curves, time_unit
from lora.report.numbers import (
    figures,
    loss_text,
    parameters_text,
    share_text,
    size_text,
    time_text,
)
from lora.report.records.records import GridCell, Memory, Point, RunSummary, SweetSpot
from lora.report.svg import png_of, svg_of


@pytest.mark.parametrize(
    "losses",
    [[1.0], [0.0, 0.0], [2.0, 2.0, 2.0], [2.0, -1.0], [5.0, 1e-9], [1e300, 1.0], [1.0, 1e300]],
)
def test_any_losses_can_be_drawn(losses: list[float]) -> None:
    points = list(enumerate(losses))
    figure = draw_curves([Curve("a", points, 0, points)], [Curve("b", points, None)], "steps")
    assert "</svg>" in svg_of(figure, "x", "told")
    assert png_of(figure)[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["$\\frac{", "<b>&", "日本語 学習", "a" * 300, "\x1b[31m", ""])
def test_any_name_can_be_drawn(name: str) -> None:
    points = [(0.0, 2.0), (1.0, 1.0)]
    curves = [Curve(name, points, 0), Curve("other", points, 1)]
    assert "\x1b" not in svg_of(draw_curves(curves, [], "steps"), "x", name)
    bars = draw_bars([(name, Memory({"weights": 10**9}, 10**9, None))])
    assert "</svg>" in svg_of(bars, "bars", name)


def test_ranks_and_rates_that_ran_away_can_be_drawn() -> None:
    tried = [GridCell(4, 1e-3, 0.5, 1), GridCell(8, 1e-3, 0.4, 1), GridCell(8, 1e-1, 1e6, 1)]
    spot = SweetSpot(8, 0.4, 8, 0.4, 0.0, "one seed")
    assert "rank 8 is best" in svg_of(draw_ranks(tried, spot), "x", "")
    enough = SweetSpot(4, 0.5, 8, 0.4, 0.2, "one seed")
    assert "rank 4 is enough" in svg_of(draw_ranks(tried, enough), "x", "")
    lines = [Curve("rank 8", [(1e-3, 0.4), (1e-1, 1e6)], 0), Curve("rank 4", [(1e-3, 0.5)], 1)]
    for base in (None, 2.0, 0.1):
        assert "rank 4" in svg_of(draw_rates(lines, base), "x", "")


def test_names_at_the_ends_of_lines_stay_apart() -> None:
    wanted = [0.5, 0.5, 0.51, 0.99, 1.0, 0.0]
    placed = spread(wanted, 0.06)
    gaps = [b - a for a, b in itertools.pairwise(sorted(placed))]
    assert min(gaps) >= 0.06 - 1e-9
    assert min(placed) >= 0
    assert max(placed) <= 1
    assert spread([], 0.1) == []
    assert sorted(spread([0.5] * 40, 0.06)) == pytest.approx([n / 39 for n in range(40)])


def test_no_line_to_a_name_crosses_a_name() -> None:
    names = ["a name of some length", "b", "another long name", "c", "d", "e"]
    curves = [Curve(name, [(0.0, 2.0), (9.0, 0.04)], n) for n, name in enumerate(names)]
    figure = draw_curves(curves, [], "steps")
    png_of(figure)  # lays out
    texts = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    ends = [text for text in texts if text.arrow_patch is not None]
    assert len(ends) == len(names)
    left = min(Text.get_window_extent(text).x0 for text in ends)
    for text in ends:
        arrow = text.arrow_patch
        assert arrow is not None
        assert arrow.get_path().vertices[:, 0].max() <= left


def test_a_dot_at_the_edge_is_drawn_whole() -> None:
    tried = [GridCell(4, 1e-3, 0.4, 1), GridCell(4, 1e-4, 0.449, 1), GridCell(8, 1e-3, 0.3, 1)]
    lines = draw_ranks(tried, SweetSpot(8, 0.3, 8, 0.3, 0.0, "one seed")).axes[0].lines
    dots = [line for line in lines if list(line.get_xdata()) == [0]]  # type: ignore[call-overload]
    assert [line.get_clip_on() for line in dots] == [False, False]


def test_the_best_are_named_and_the_others_pale() -> None:
    def run(number: int, status: str, group: str) -> RunSummary:
        held_out = (Point(0, 2.0), Point(1, number / 10))
        return RunSummary(
            name=f"{group}/{number}", label=str(number), folder="x", status=status, group=group,  # type: ignore[arg-type]
            eval_loss=number / 10, held_out=held_out,
        )  # fmt: skip

    candidates = [run(n, "finished", "s") for n in range(9, 0, -1)] + [run(0, "failed", "s")]
    named, pale = choose_curves([*candidates, run(50, "finished", "")])
    assert [r.label for r in named] == ["50", "1", "2", "3", "4", "5"]
    assert len(pale) == 5
    assert pale[-1].label == "0"


def test_numbers_have_sensible_digits() -> None:
    assert loss_text(0.123456) == "0.1235"
    assert loss_text(None) == loss_text(math.nan) == size_text(None) == figures(math.inf) == "–"
    assert [figures(v) for v in (1234.5, 12.345, 0.012345, 0.0)] == ["1,234", "12.3", "0.0123", "0"]
    assert [size_text(v) for v in (999, 2_500, 9_820_000, 1.436e9)] == [
        "999 B", "2.50 kB", "9.82 MB", "1.44 GB"
    ]  # fmt: skip
    assert [time_text(v) for v in (2.5, 299.0, 600.0, 7200.0)] == [
        "2.50 s", "299 s", "10.0 min", "2.00 h"
    ]  # fmt: skip
    assert [parameters_text(v) for v in (None, 640, 304_920, 4_884_480, 8.03e9)] == [
        "–", "640", "305 k", "4.88 M", "8.03 B"
    ]  # fmt: skip
    assert share_text(0.0178) == "1.78 %"
    assert time_unit(100) == ("seconds", 1.0)
    assert time_unit(1000)[0] == "minutes"
    assert time_unit(100_000)[0] == "hours"
