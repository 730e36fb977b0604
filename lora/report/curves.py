"""loss.png: training and validation loss of a few runs against steps; a table of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora.runs.disk import atomic_write
from lora.runs.record import MetricsRow

if TYPE_CHECKING:
    from rich.table import Table

    from lora.lora_module import ParameterCounts

# Okabe and Ito's colours: distinct for people with any colour vision; in grey the styles differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))


def draw_loss_curves(
    curves: Sequence[tuple[str, Sequence[MetricsRow]]], path: Path, *, title: str
) -> None:
    """Write a PNG of training and validation loss against steps.

    `curves` pairs a name with the rows of a run's metrics.jsonl. Training loss is pale and smoothed
    over about 2 % of the run; validation loss has a marker at each evaluation.
    """
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, rows) in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        style = LINE_STYLES[number % len(LINE_STYLES)]
        trained = [(row.step, row.loss) for row in rows if row.loss is not None]
        held_out = [(row.step, row.eval_loss) for row in rows if row.eval_loss is not None]
        if trained:
            steps, losses = zip(*trained, strict=True)
            axes.plot(steps, smooth(losses), color=colour, alpha=0.3, linewidth=1)
        if held_out:
            steps, losses = zip(*held_out, strict=True)
            label = f"{name}: {losses[-1]:.3f}"
            axes.plot(steps, losses, color=colour, linestyle=style, marker="o", ms=3, label=label)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title="validation loss at the end (pale: training)", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    atomic_write(path, picture.getvalue())


def parameter_table(counts: ParameterCounts) -> Table:
    """Return a table of trainable and frozen parameters."""
    from rich.table import Table

    table = Table(title="Parameters", title_justify="left")
    table.add_column("part")
    table.add_column("number", justify="right")
    table.add_column("share", justify="right")
    rows = [
        ("LoRA (A and B)", counts.lora),
        ("other trainable (embeddings)" if counts.lora else "trainable", counts.other_trainable),
        ("frozen", counts.frozen),
        ("all", counts.total),
    ]
    for name, number in rows:
        table.add_row(name, f"{number:,}", f"{number / max(1, counts.total):.2%}")
    return table


def smooth(losses: Sequence[float]) -> list[float]:
    """Return an exponential moving average over about 2 % of the losses."""
    weight = math.exp(-50 / max(50, len(losses)))
    smoothed, value = [], losses[0]
    for loss in losses:
        value = weight * value + (1 - weight) * loss
        smoothed.append(value)
    return smoothed
