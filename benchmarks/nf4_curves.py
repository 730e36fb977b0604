"""What a quantised base costs in loss: nf4, fp8 and int8 beside bf16, three seeds of each.

    python benchmarks/nf4_curves.py --jobs 6 --out benchmarks/results/nf4_curves_h200.jsonl
    python benchmarks/nf4_curves.py --dry-run                      # two steps on a CPU
    python benchmarks/nf4_curves.py --read benchmarks/results/nf4_curves_h200.jsonl --write

200 steps of LoRA on Python's own documentation, as in `gpu_curves.py`, each run in its own process.
A seed decides the initial A and the order of the data, so that runs of one seed differ in their
base alone: differences are taken within a seed, and their spread is that over seeds. Held-out texts
are measured before and after training on the base that was trained on, and the adapter also on the
unquantised base. Prints a JSON line per run; --read makes table and picture of them, and --write
puts these into the documentation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from devices.rows import print_row
from gpu_curves import mean_of_last, run_once

from lora.device import choose_device
from lora.pretrained.sources import find_model
from lora.runs.disk import read_rows

Row = dict[str, Any]
BASES = {"bf16": "auto", "fp8": "fp8", "int8": "int8", "nf4": "nf4"}
"""Values of --base-dtype by what the results call them."""
SEEDS = (0, 1, 2)
SMOOTHED_STEPS = 15
DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "performance.md", DOCS / "pictures" / "nf4_curves.svg"
START, END = "<!-- nf4_curves:start -->", "<!-- nf4_curves:end -->"


def run_child(model: str | None, base: str, seed: int, steps: int) -> Row:
    """Return the row of one run, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        out, name = Path(folder), "run"
        row = run_once(
            model,
            out,
            name,
            steps,
            draw=seed,
            seed=seed,
            base_dtype=BASES[base],  # type: ignore[arg-type]
        )
        measured = [
            m["eval_loss"] for m in read_rows(out / name / "metrics.jsonl") if "eval_loss" in m
        ]
    choice = choose_device()
    hardware = "a CPU"
    if choice.device.type == "cuda":
        import torch

        hardware = f"one {torch.cuda.get_device_name()}"
    about = {"base": base, "seed": seed, "hardware": hardware}
    return {**about, **row, "run": f"{base}, seed {seed}", "eval_loss_before": measured[0]}


def run_all(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of all runs, several of them at a time."""
    model = str(find_model(arguments.model).folder)  # converted once, before there are several

    def run(base_and_seed: tuple[str, int]) -> Row:
        base, seed = base_and_seed
        command = [sys.executable, __file__, "--child", base, str(seed), "--model", model]
        command += ["--steps", str(arguments.steps)]
        about = {"base": base, "seed": seed}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=arguments.limit_s
            )
        except subprocess.TimeoutExpired:
            return {**about, "failed": f"not in {arguments.limit_s:.0f} s"}
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            return {**about, "failed": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
        found: Row = json.loads(lines[-1])
        return found

    # All bases of a seed first: what is cut short can still be compared.
    pairs = [(base, seed) for seed in arguments.seeds for base in arguments.bases]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        yield from pool.map(run, pairs)


def by_base(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Return the runs that finished, by base and seed, in the order of the table."""
    found: dict[str, dict[int, Row]] = {}
    for base in BASES:
        own = {row["seed"]: row for row in rows if row["base"] == base and "failed" not in row}
        if own:
            found[base] = own
    return found


def table(rows: Sequence[Row]) -> str:
    """Return the held-out losses and their differences to bf16, in Markdown."""
    runs = by_base(rows)
    lines = [
        "| base | held out, before | after | difference to bf16 | the adapter on the bf16 base "
        "| training loss, last 20 steps | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for base, own in runs.items():
        plain = runs.get("bf16", {})
        seeds = [seed for seed in own if seed in plain]
        last = {seed: mean_of_last(row["losses"]) for seed, row in own.items()}
        held_out = [own[s]["eval_loss"] - plain[s]["eval_loss"] for s in seeds]
        trained = [last[s] - mean_of_last(plain[s]["losses"]) for s in seeds]
        cells = [
            f"{statistics.fmean(row['eval_loss_before'] for row in own.values()):.4f}",
            _spread([row["eval_loss"] for row in own.values()]),
            "" if base == "bf16" else _spread(held_out, sign="+"),
            _spread([row["eval_loss_on_the_base_as_it_was"] for row in own.values()]),
            _spread(list(last.values())),
            "" if base == "bf16" else _spread(trained, sign="+"),
        ]
        lines.append(f"| {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean and standard deviation."""
    if not values:
        return "not run"
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot training losses, and each seed's held-out difference to bf16, into `path`."""
    import matplotlib
    from findings_pictures import COLOURS

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    runs = by_base(rows)
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for index, (base, own) in enumerate(runs.items()):
        curves = [_smooth(row["losses"]) for row in own.values()]
        mean = [statistics.fmean(losses) for losses in zip(*curves, strict=True)]
        steps, style = range(1, len(mean) + 1), ("-", "--", "-.", ":")[index % 4]
        left.plot(steps, mean, style, color=COLOURS[index], label=base, linewidth=1.3)
        bounds = [[side(losses) for losses in zip(*curves, strict=True)] for side in (min, max)]
        left.fill_between(steps, *bounds, color=COLOURS[index], alpha=0.12)
    left.set(xlabel="step", ylabel="training loss, nats")
    left.set_title(f"mean of {SMOOTHED_STEPS} steps; shaded: range over seeds", fontsize=9)
    left.legend(frameon=False)
    others = [base for base in runs if base != "bf16"]
    for x, base in enumerate(others):
        seeds = [seed for seed in runs[base] if seed in runs.get("bf16", {})]
        apart = [runs[base][s]["eval_loss"] - runs["bf16"][s]["eval_loss"] for s in seeds]
        colour = COLOURS[list(runs).index(base)]
        right.scatter([x] * len(apart), apart, color=colour, zorder=3)
        if apart:
            right.hlines(statistics.fmean(apart), x - 0.2, x + 0.2, color=colour)
    right.axhline(0, color="#8a9bb0", linewidth=0.8)
    right.set_xticks(range(len(others)), others)
    right.set_xlim(-0.5, max(len(others), 1) - 0.5)
    right.set_title("held-out loss after training, less bf16's", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "nf4_curves"}):  # the same rows, the same bytes
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _smooth(losses: Sequence[float]) -> list[float]:
    """Return the mean of each step and those before it, at most SMOOTHED_STEPS."""
    windows = (losses[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(losses) + 1))
    return [statistics.fmean(window) for window in windows]


def main() -> int:
    """Run the jobs, or show what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="as in lora finetune; by default SmolLM2-135M-Instruct")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--limit-s", type=float, help="seconds after which a run counts as failed")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--dry-run", action="store_true", help="two steps, one seed")
    parser.add_argument("--read", type=Path, help="show what --out wrote, run nothing")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")
    parser.add_argument("--write", action="store_true", help="table and picture into docs/")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        base, seed = arguments.child
        print(json.dumps(run_child(arguments.model, base, int(seed), arguments.steps)))
        return 0
    if arguments.dry_run:
        arguments.steps, arguments.seeds = 2, arguments.seeds[:1]
    rows: list[Row] = []
    if arguments.read:
        rows = [json.loads(line) for line in arguments.read.read_text("utf-8").splitlines()]
    for row in [] if arguments.read else run_all(arguments):
        rows.append(row)
        print_row(row, arguments.out)
    made = table(rows)
    print(made)
    if arguments.picture:
        draw(rows, arguments.picture)
    if arguments.write:
        from devices.table import put_between

        draw(rows, PICTURE)
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(put_between(page, START, END, made), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
