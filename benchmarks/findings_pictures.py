"""Plots for `findings.py`, from its rows or from a file of them.

python benchmarks/findings_pictures.py rates benchmarks/results/findings.jsonl rates.svg
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora.report import COLOURS
from lora.runs.disk import atomic_write

Row = dict[str, Any]
METHODS = {"lora": ("LoRA", COLOURS[0], "-", "o"), "full": ("full", COLOURS[1], "--", "s")}
SUFFIXES = (".svg", ".png")


def draw_sides(rows: list[Row], path: Path) -> None:
    """Plot the learning-rate trials and, beside them, all seeds at the best learning rate."""
    figure, (left, right) = _figure(2)
    tried = [row for row in rows if row["kind"] == "rate" and row["eval_loss"] is not None]
    _draw_rates(left, tried)
    left.set_title("learning-rate trials of one seed")
    members = [row for row in rows if row["kind"] == "member"]
    for x, (method, (_, colour, _, marker)) in enumerate(METHODS.items()):
        losses = [row["final_eval_loss"] for row in members if row["method"] == method]
        right.scatter([x] * len(losses), losses, color=colour, marker=marker, zorder=3)
        right.hlines(_mean(losses), x - 0.2, x + 0.2, color=colour)
        right.annotate(f"{_mean(losses):.4f}", (x + 0.23, _mean(losses)), va="center", color=colour)
    right.set_xticks(range(len(METHODS)), [name for name, *_ in METHODS.values()])
    right.set_xlim(-0.5, len(METHODS) - 0.3)
    right.set_title("all seeds at the best learning rate; line: mean")
    _save(figure, path, f"{rows[0]['question']}: validation loss, nats per token")


def draw_ranks(rows: list[Row], path: Path) -> None:
    """Plot validation loss against rank, each at its best learning rate: one panel per task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, panels = _figure(len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        own = [row for row in rows if row["task"] == task and row["eval_loss"] is not None]
        ranks = sorted({row["rank"] for row in own})
        best = {rank: _at_best([row for row in own if row["rank"] == rank]) for rank in ranks}
        for rank in ranks:
            losses = best[rank][1]
            axes.scatter([rank] * len(losses), losses, color=COLOURS[0], s=14, zorder=3)
        axes.plot(ranks, [_mean(best[rank][1]) for rank in ranks], color=COLOURS[0])
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [f"{rank}\n{best[rank][0]:g}" for rank in ranks])
        axes.set_xlabel("rank, and its best learning rate")
        axes.set_title(task)
        axes.margins(0.12)
    _save(figure, path, "validation loss against rank, each at its best learning rate; dots: seeds")


def draw_methods(rows: list[Row], path: Path) -> None:
    """Plot time per step, peak memory and validation loss of each member as bars."""
    members = [row for row in rows if row["kind"] == "member"]
    names = [{"lora": "LoRA", "full": "full", "peft": "PEFT"}[row["method"]] for row in members]
    figure, panels = _figure(3)
    shown = (
        ("ms per step", [1000 * row["step_s_median"] for row in members]),
        ("peak memory, GB", [row["peak_memory_bytes"] / 1e9 for row in members]),
        ("final validation loss, nats", [row["final_eval_loss"] for row in members]),
    )
    for axes, (title, values) in zip(panels, shown, strict=True):
        bars = axes.bar(names, values, color=COLOURS[: len(names)])
        axes.bar_label(bars, [f"{value:.3g}" for value in values])
        axes.set_ylabel(title)
        axes.grid(visible=False, axis="x")
    _save(figure, path, f"{members[0]['base']}, the same batches")


def draw_rates(rows: list[Row], path: Path) -> None:
    """Plot validation loss against learning rate for both methods."""
    figure, (axes,) = _figure(1)
    _draw_rates(axes, [row for row in rows if row["eval_loss"] is not None])
    best = {m: _at_best([row for row in rows if row["method"] == m])[0] for m in METHODS}
    _save(
        figure, path,
        f"lowest mean: LoRA {best['lora']:g}, full {best['full']:g} (shaded: range over seeds)",
    )  # fmt: skip


def _draw_rates(axes: Any, rows: list[Row]) -> None:
    for method, (name, colour, style, marker) in METHODS.items():
        own = [row for row in rows if row["method"] == method]
        rates = sorted({row["learning_rate"] for row in own})
        losses = [[r["eval_loss"] for r in own if r["learning_rate"] == rate] for rate in rates]
        means = [_mean(values) for values in losses]
        axes.plot(rates, means, color=colour, linestyle=style, marker=marker, label=name)
        axes.fill_between(
            rates, list(map(min, losses)), list(map(max, losses)), color=colour, alpha=0.2
        )
    axes.set_xscale("log")
    if rows and max(row["eval_loss"] for row in rows) > 3 * min(row["eval_loss"] for row in rows):
        axes.set_yscale("log")
    axes.set_xlabel("peak learning rate")
    axes.legend(frameon=False)


def _at_best(rows: list[Row]) -> tuple[float, list[float]]:
    """Return the learning rate with the lowest mean loss, and the losses there."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        loss = math.inf if row["eval_loss"] is None else row["eval_loss"]
        losses.setdefault(row["learning_rate"], []).append(loss)
    n_seeds = max(map(len, losses.values()))
    complete = {rate: values for rate, values in losses.items() if len(values) == n_seeds}
    return min(complete.items(), key=lambda item: _mean(item[1]))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _figure(n_panels: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * n_panels + 1, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("validation loss (nats per token)")
    return figure, list(panels)


def _save(figure: Any, path: Path, title: str) -> None:
    import io

    import matplotlib

    figure.suptitle(title)
    for suffix in SUFFIXES:
        picture = io.BytesIO()
        metadata = {"Date": None} if suffix == ".svg" else None
        with matplotlib.rc_context({"svg.hashsalt": title}):  # the same rows, the same bytes
            figure.savefig(picture, format=suffix[1:], metadata=metadata)
        atomic_write(path.with_suffix(suffix), picture.getvalue())


def main() -> None:
    """Plot one question from a file of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    lines = arguments.rows.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    own = [row for row in rows if row["question"] == arguments.question]
    draw = {"ranks": draw_ranks, "rates": draw_rates, "methods": draw_methods}.get(
        arguments.question, draw_sides
    )
    draw(own, arguments.picture)


if __name__ == "__main__":
    main()
