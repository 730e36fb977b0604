"""Loss curves of the fast and the plain step on a real model and real text, on a GPU.

    python benchmarks/gpu_curves.py --out benchmarks/results/gpu_curves_h200.jsonl

200 steps of LoRA on Python's own documentation (pydoc's topics): the fast step, the plain one, and
the plain one from another draw of A, whose distance is the noise that the fast step is held
against. Prints one JSON object a run, then one with the distances; --picture draws the curves.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lora.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from lora.finetune import FinetuneJob, finetune
from lora.runs import read_rows


def run_once(model: str | None, out: Path, name: str, steps: int, *, fast: bool, draw: int) -> dict:
    """Return losses, held-out loss and time of one run."""
    texts = [{"text": text} for _, text in sorted(pydoc_data.topics.topics.items())]
    job = FinetuneJob(
        data=texts,
        model=model,
        lora=LoRAConfig(rank=16, alpha=32.0, init_seed=draw),
        train=TrainConfig(steps=steps, batch_size=4, seed=0),
        data_config=DataConfig(max_length=512, long_examples="split"),
        run=RunConfig(out=out, name=name, fast=fast, eval_every_steps=steps),
    )
    began_s = time.perf_counter()
    done = finetune(job)
    wall_s = time.perf_counter() - began_s
    rows = read_rows(done.folder / "metrics.jsonl")
    seconds = sorted(row["step_s"] for row in read_rows(done.folder / "timings.jsonl"))
    return {
        "run": name,
        "steps": steps,
        "eval_loss": done.result.eval_loss,
        "step_ms": round(1000 * seconds[len(seconds) // 2], 2),
        "wall_s": round(wall_s, 1),
        "losses": [round(row["loss"], 4) for row in rows if "loss" in row],
    }


def distance(one: list[float], other: list[float]) -> float:
    """Return the mean distance of two curves, nats."""
    return statistics.fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def draw_curves(runs: list[dict], path: Path) -> None:
    """Write a picture of the runs' losses to `path`."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    styles = ({"linewidth": 2.6, "alpha": 0.45}, {"linewidth": 1.0}, {"linewidth": 1.0, "ls": ":"})
    for run, style in zip(runs, styles, strict=True):
        axes.plot(range(1, len(run["losses"]) + 1), run["losses"], label=run["run"], **style)
    axes.set(xlabel="step", ylabel="loss of the step (nats)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    """Run the three jobs and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="as lora finetune's; left out, the default model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file")
    parser.add_argument("--from-file", type=Path, help="draw what --out wrote, run nothing")
    arguments = parser.parse_args()
    if arguments.from_file:
        lines = [json.loads(line) for line in arguments.from_file.read_text().splitlines()]
        draw_curves([line for line in lines if "losses" in line], arguments.picture)
        return 0
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name, fast, draw in (
            ("plain step", False, 0),
            ("fast step", True, 0),
            ("plain step, another draw of A", False, 1),
        ):
            runs.append(
                run_once(arguments.model, Path(folder), name, arguments.steps, fast=fast, draw=draw)
            )
    plain, fast, other = (run["losses"] for run in runs)
    found = {
        "fast_to_plain_nats": round(distance(plain, fast), 5),
        "plain_to_other_draw_nats": round(distance(plain, other), 5),
        "gained_nats": round(statistics.fmean(plain[:5]) - statistics.fmean(plain[-5:]), 4),
    }
    lines = [json.dumps(line) for line in (*runs, found)]
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if arguments.picture:
        draw_curves(runs, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
